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
import os
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NoReturn

import msgspec
from msgspec import structs
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ochat import config as configuration
from ochat.config import Config
from ochat.console import configure_logging, stdout
from ochat.errors import ConfigError, OchatError, complain

PROFILE = "--profile"
PURPOSE = f"""Trains from the newest checkpoint, or from the base. On several GPUs the same arguments go to
torchrun --nproc-per-node N -m ochat.train

  {PROFILE}   instead records a few steps from the base, prints time per part next to its roofline and what the host
              waited for, writes traces into RUN/profile, and ends; the run itself is left as it is"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and exits with the documented code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    explain_if_asked(arguments, "ochat train", PURPOSE)
    configure_logging()
    try:
        config = read_arguments([a for a in arguments if a != PROFILE])
        if PROFILE in arguments:
            from ochat.train.profile import profile

            for line in profile(config):
                stdout.print(line, markup=False)
        else:
            from ochat.train.trainer import train  # torch takes seconds to import; a wrong option should not

            train(config)
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


def explain_if_asked(
    arguments: Sequence[str],
    command: str,
    purpose: str,
    *,
    more: Mapping[str, type] | None = None,
    without: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Where --help is among the arguments: usage and every configuration key, and exits with 0. Where there are none:
    usage alone, and exits with 2.

    `more`: sections of the command's own; `without`: keys, by section, that it does not take.
    """
    if arguments and not {"--help", "-h"} & set(arguments):
        return
    console = Console(highlight=False)
    console.print(f"usage: {escape(command)} CONFIG.toml [--section.key=value ...]\n\n{purpose}\n", soft_wrap=True)
    if not arguments:
        console.print(f"`{escape(command)} --help` lists every key; configs/ has files to start from.", soft_wrap=True)
        sys.exit(2)
    console.print(_keys(more or {}, without or {}))
    sys.exit(0)


def _keys(more: Mapping[str, type], without: Mapping[str, Collection[str]]) -> Table:
    """Every key with its default, what it is for, and the words it can be."""
    key, meaning = Column("key", no_wrap=True), Column("what it is", overflow="fold")
    default = Column("default", max_width=20, overflow="fold")  # of 80 columns the explanations get the most
    table = Table(key, default, meaning, box=None, padding=(0, 2, 0, 0))
    for name, kind in more.items():
        _add_keys(table, name, kind)
    for section in structs.fields(Config):
        if section.name == "classes":
            _add_keys(table, "classes.NAME", configuration.ClassConfig)
        else:
            _add_keys(table, section.name, type(getattr(Config(), section.name)), without.get(section.name, ()))
        if section.name == "data" and "mix" not in without.get("data", ()):
            _add_keys(table, "data.mix.NAME", configuration.MixConfig)
    return table


def _add_keys(table: Table, section: str, kind: type, without: Collection[str] = ()) -> None:
    comments = configuration.explanations(kind)
    for key in (key for key in structs.fields(kind) if key.name not in without):
        default = {} if key.default is msgspec.NODEFAULT else key.default
        words = _words(key.type)
        choice = f" ({', '.join(words)})" if len(words) > 1 else ""
        table.add_row(f"{section}.{key.name}", escape(repr(default)), escape(f"{comments.get(key.name, '')}{choice}"))


def _words(kind: Any) -> list[str]:
    """The words among the values of a type: Literal["a", "b"] | bool has two."""
    if typing.get_origin(kind) is Literal:
        return [word for word in typing.get_args(kind) if isinstance(word, str)]
    return [word for part in typing.get_args(kind) for word in _words(part)]
