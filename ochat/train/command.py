"""The command line of training: a configuration file, options that override it, and an exit code.

Exit codes of each process:
    0             done
    1             an error that its message explains; or a fault of ours, with a traceback
    2             a command line that cannot be read
    3             another process is gone or hangs; the same command goes on from the newest checkpoint
    128 + signal  a signal stopped the run, and its state is saved: 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM
torchrun prints its processes' codes and exits with 1 itself whatever they are.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat import config as configuration
from ochat.config import Config
from ochat.errors import ConfigError, OchatError, complain

PROFILE = "--profile"
PURPOSE = f"""Trains from the newest checkpoint, or from the base.

  {PROFILE}   instead records a few steps from the base, prints where their time goes beside the least it could take,
              writes traces into RUN/profile, and ends; the run itself is left as it is"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and exits with the documented code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or "--help" in arguments or "-h" in arguments:
        print_help("torchrun --nproc-per-node N -m ochat.train", PURPOSE)
        sys.exit(0 if arguments else 2)
    try:
        config = read_arguments([a for a in arguments if a != PROFILE])
        if PROFILE in arguments:
            from ochat.train.profile import profile as run
        else:
            from ochat.train.trainer import train as run  # torch takes seconds to import; a wrong option should not
        run(config)
        exit_code = 0
    except BrokenPipeError:  # nobody reads what is printed: `ochat` ends without a word
        raise
    except (OchatError, OSError) as error:
        complain(error)
        exit_code = getattr(error, "exit_code", 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(exit_code)
    elif exit_code:
        sys.exit(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """Ends a process that was one of several, with all that was printed and what was registered with atexit done.

    Python is not taken down first: a thread of gloo that lets go of a tensor meanwhile would abort the process, and
    torchrun would take a run that has ended for one that has failed (pytorch/pytorch#179291).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(exit_code)


def read_arguments(arguments: Sequence[str]) -> Config:
    """`CONFIG.toml --section.key=value ...` as a Config; ConfigError for anything else."""
    return configuration.load(*split_arguments(arguments))


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration file and the options. Raises: ConfigError unless there is one file."""
    files = [a for a in arguments if not a.startswith("--")]
    if len(files) != 1:
        raise ConfigError(
            f"expected one configuration file and --section.key=value options, got {' '.join(arguments)!r}"
        )
    return files[0], [a for a in arguments if a.startswith("--")]


def print_help(command: str, purpose: str, more: Mapping[str, type] | None = None) -> None:
    """Usage, and every configuration key with its default and what it is for; `more`: sections of the command's own."""
    console = Console(highlight=False)
    console.print(f"usage: {escape(command)} CONFIG.toml [--section.key=value ...]\n\n{purpose}\n", soft_wrap=True)
    table = Table("key", "default", "what it is", box=None, padding=(0, 3, 0, 0))
    for name, kind in (more or {}).items():
        _add_keys(table, name, kind)
    for section in dataclasses.fields(Config):
        if section.name == "classes":
            _add_keys(table, "classes.NAME", configuration.ClassConfig)
        else:
            _add_keys(table, section.name, type(getattr(Config(), section.name)))
        if section.name == "data":
            _add_keys(table, "data.mix.NAME", configuration.MixConfig)
    console.print(table)


def _add_keys(table: Table, section: str, kind: type) -> None:
    comments = _comments(kind)
    for key in dataclasses.fields(kind):
        default = key.default if key.default is not dataclasses.MISSING else {}
        table.add_row(f"{section}.{key.name}", escape(repr(default)), escape(comments.get(key.name, "")))


def _comments(kind: type) -> dict[str, str]:
    """field -> the comment behind it in the source: the configuration explains itself in one place."""
    found = (re.match(r"    (\w+): .*?  # (.*)", line) for line in inspect.getsource(kind).splitlines())
    return {match[1]: match[2] for match in found if match}
