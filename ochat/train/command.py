"""The command line of training: a configuration file, options that override it, and an exit code.

Exit codes: 0 done; 1 an error that its message explains; 128 + signal when a signal stopped the run and its state is
saved.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat import config as configuration
from ochat.config import Config
from ochat.errors import ConfigError, OchatError


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and exits with the documented code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or "--help" in arguments or "-h" in arguments:
        print_help("torchrun --nproc-per-node N -m ochat.train")
        sys.exit(0 if arguments else 2)
    try:
        config = read_arguments(arguments)
        from ochat.train.trainer import train  # torch takes seconds to import; a wrong option should not

        train(config)
    except OchatError as error:
        rank = os.environ.get("RANK", "0")  # every rank speaks: an error may be one rank's alone
        where = "" if rank == "0" else f"rank {rank}: "
        Console(stderr=True, highlight=False).print(
            f"{where}[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True
        )
        sys.exit(getattr(error, "exit_code", 1))


def read_arguments(arguments: Sequence[str]) -> Config:
    """`CONFIG.toml --section.key=value ...` as a Config; ConfigError for anything else."""
    files = [a for a in arguments if not a.startswith("--")]
    if len(files) != 1:
        raise ConfigError(
            f"expected one configuration file and --section.key=value options, got {' '.join(arguments)!r}"
        )
    return configuration.load(files[0], [a for a in arguments if a.startswith("--")])


def print_help(command: str) -> None:
    """Usage, and every configuration key with its default."""
    console = Console(highlight=False)
    console.print(f"usage: {escape(command)} CONFIG.toml [--section.key=value ...]\n", soft_wrap=True)
    table = Table(
        "key", "default", box=None, padding=(0, 3, 0, 0), title="keys of the configuration", title_justify="left"
    )
    for section in dataclasses.fields(Config):
        kind = {"classes": configuration.ClassConfig}.get(section.name) or type(getattr(Config(), section.name))
        prefix = "classes.NAME" if section.name == "classes" else section.name
        for key in dataclasses.fields(kind):
            default = key.default if key.default is not dataclasses.MISSING else {}
            table.add_row(f"{prefix}.{key.name}", escape(repr(default)))
    console.print(table)
