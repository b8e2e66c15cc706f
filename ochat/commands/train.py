"""The command line of training: a configuration file, options that override it, and an exit code.

Exit codes of each process:
    0             done
    1             an error that its message explains; or a fault of ours, with a traceback
    2             a command line that cannot be read
    3             another process is gone or hangs; the same command resumes from the newest checkpoint
    128 + signal  a signal stopped the run, and its state is saved: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM
torchrun prints the codes of its processes and always exits with 1 itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ochat import config as configuration
from ochat.config import Config
from ochat.console import complain, stdout
from ochat.errors import OchatError

SCHEMA = Config


@dataclass(frozen=True)
class TrainOptions:
    """Trains from the newest checkpoint in the run folder, or from the base.

    On several GPUs the same arguments go to torchrun --nproc-per-node N -m ochat.train
    """

    config: Path
    """a configuration in TOML; configs/ has files to start from"""
    profile: bool = False
    """instead record a few steps from the base, print time per part next to its roofline and what the host waited for,
    and write traces to RUN/profile; the run itself does not change"""


def main(options: TrainOptions, overrides: Sequence[str] = ()) -> None:
    """Trains, and exits with the documented code."""
    exit_code = 0
    try:
        config = configuration.load(options.config, overrides)
        if options.profile:
            from ochat.train.profile import profile

            for line in profile(config):
                stdout.print(line, markup=False)
        else:
            from ochat.train.trainer import train  # torch takes seconds to import; a wrong option should not

            train(config)
    except BrokenPipeError:  # the reader of the output is gone: `ochat` ends without a word
        raise
    except (OchatError, OSError) as error:
        complain(error)
        exit_code = getattr(error, "exit_code", 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(exit_code)
    elif exit_code:
        sys.exit(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """Ends one of several processes without shutting down the interpreter; runs atexit handlers and flushes output.

    A gloo thread that frees a tensor during shutdown can abort the process, and torchrun would then report a finished
    run as failed (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone
            stream.flush()
    os._exit(exit_code)
