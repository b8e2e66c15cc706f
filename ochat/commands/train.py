"""The command line of training: a configuration file, options that override it, and an exit code.

`--gpus` starts the processes (distributed/launch.py), each of which runs this command without it. Exit codes:
    0             done
    1             an error that its message explains; or a fault of ours, with a traceback
    2             a command line that cannot be read
    3             another process is gone or hangs; the same command resumes from the newest checkpoint
    128 + signal  a signal stopped the run, and its state is saved: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM
torchrun in place of --gpus prints the codes of its processes and always exits with 1 itself.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ochat import config as configuration
from ochat.config import Config
from ochat.console import complain, next_command, stdout, tell
from ochat.errors import ConfigError, Interrupted, OchatError, UsageError
from ochat.overrides import at_least

SCHEMA = Config
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """Trains from the newest checkpoint in the run folder, or from the base.

    Ctrl-C saves and stops; the same command goes on.

    On several machines, each runs it with its own --node-rank.
    """

    config: Path
    """a configuration in TOML; configs/ has files to start from"""
    gpus: int = 1
    """of this machine, a process each; on a CPU (train.device = "cpu") the number of processes"""
    nodes: int = 1
    """machines, with as many GPUs each and base, data and run.dir on a shared disk"""
    node_rank: int | None = None
    """of several machines, the number of this one, from 0"""
    rendezvous: str = ""
    """of several machines, HOST:PORT of number 0, a free port that the others reach"""
    profile: bool = False
    """instead record a few steps from the base, print time per part next to its roofline and what the host waited for,
    and write traces to RUN/profile; the run itself does not change"""


def main(options: TrainOptions, overrides: Sequence[str] = ()) -> None:
    """Trains, and exits with the documented code."""
    exit_code, is_alone = 0, int(os.environ.get("WORLD_SIZE", "1")) == 1
    try:
        config = configuration.load(options.config, overrides)
        _check(options)
        if options.gpus * options.nodes > 1:
            exit_code = _launch(options, config, overrides)
        elif options.profile:
            from ochat.train.profile import profile

            for line in profile(config):
                stdout.print(line, markup=False)
            next_command("ochat train", options.config, *overrides)
        else:
            from ochat.train.trainer import train  # torch takes seconds to import; a wrong option should not

            if is_alone and config.train.device != "cpu" and (count := gpus_seen()) > 1:
                log.info(f"on one of the {count} GPUs of this machine; on all of them: add --gpus {count}")
            train(config)
    except BrokenPipeError:  # the reader of the output is gone: `ochat` ends without a word
        raise
    except Interrupted as stopped:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # after all that the first rank printed
            tell(f"Interrupted, {stopped}")
        exit_code = stopped.exit_code
    except (OchatError, OSError) as error:
        complain(error)
        exit_code = getattr(error, "exit_code", 1)
    if not is_alone:
        _leave(exit_code)
    elif exit_code:
        sys.exit(exit_code)


def _check(options: TrainOptions) -> None:
    """Raises: UsageError for counts of processes that cannot be, or no way for machines to meet."""
    at_least(options, gpus=1, nodes=1)
    is_default = options.gpus == options.nodes == 1
    if "TORCHELASTIC_RUN_ID" in os.environ and not is_default:
        raise UsageError("--gpus and --nodes start the processes: leave them out under torchrun, or leave out torchrun")
    if options.nodes == 1 and (options.rendezvous or options.node_rank is not None):
        raise UsageError("--node-rank and --rendezvous need --nodes, the number of machines")
    if options.nodes > 1:
        host, _, port = options.rendezvous.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(
                f"--rendezvous {options.rendezvous!r}: --nodes needs HOST:PORT of machine 0, such as node0:29400"
            )
        if options.node_rank is None or not 0 <= options.node_rank < options.nodes:
            raise UsageError(
                f"--node-rank {options.node_rank}: --nodes {options.nodes} needs the number of this machine, from 0 to "
                f"{options.nodes - 1}"
            )


def _launch(options: TrainOptions, config: Config, overrides: Sequence[str]) -> int:
    """Starts the processes of this machine, which are this command without --gpus; the exit code.

    Raises: ConfigError where there are not as many GPUs.
    """
    from ochat.distributed.launch import launch

    count = gpus_seen()
    if config.train.device != "cpu" and options.gpus > count:
        remedy = f"--gpus {count}" if count > 1 else "leave out --gpus" if count else "--train.device=cpu"
        raise ConfigError(
            f"--gpus {options.gpus}, but torch sees {count or 'no'} GPU{'s' * (count > 1)} here; use {remedy}"
        )
    arguments = [str(options.config), *overrides, *["--profile"] * options.profile]
    where = {"node_rank": options.node_rank or 0, "rendezvous": options.rendezvous}
    return launch(arguments, options.gpus, nodes=options.nodes, **where)


def gpus_seen() -> int:
    """How many GPUs torch sees; makes no context on them."""
    import torch

    return torch.cuda.device_count()


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
