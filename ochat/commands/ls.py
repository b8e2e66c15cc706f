"""`ochat ls templates | configs | models`: what there is to choose from, a line each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table

from ochat.console import next_command, stdout
from ochat.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
NEXT = {
    "templates": ("ochat prepare --input CHATS.jsonl --base BASE --template NAME --output DATA",),
    "configs": ("ochat check CONFIG.toml",),
    "models": ("ochat init-base --hf FOLDER BASE",),
}


@dataclass(frozen=True)
class LsOptions:
    """Lists what there is to choose from.

    Templates for `ochat prepare`, configs for `ochat train`, model families.
    """

    what: Literal["templates", "configs", "models"]
    """templates, configs or models"""


def main(options: LsOptions) -> None:
    """Prints a table. Raises: ConfigError where the configs are not installed."""
    heads, rows = {"templates": templates, "configs": configs, "models": models}[options.what]()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=head == heads[0], justify="right" if head == "context" else "left")
    for row in rows:
        table.add_row(*row)
    stdout.print(table)
    next_command(*NEXT[options.what])


def templates() -> tuple[list[str], Iterator[tuple[str, ...]]]:
    """Each built-in template, and those of a base's own."""
    from ochat.text import template

    def rows() -> Iterator[tuple[str, ...]]:
        for name in sorted([*template.names(), *template.ALIASES]):
            each = template.load(name)
            yield name, f"{each.context:,}", each.eot, each.default_condition or "(none)"
        yield "base", "", "", "the base's own chat template"

    return ["template", "context", "end of turn", "served as"], rows()


def configs() -> tuple[list[str], Iterator[tuple[str, ...]]]:
    """Each file of configs/, and its first line."""
    files = sorted(CONFIGS.glob("*.toml"))
    if not files:
        raise ConfigError(f"{CONFIGS} is not there: configs/ comes with the repository; or write one with `ochat new`")

    def rows() -> Iterator[tuple[str, ...]]:
        for file in files:
            lines = (line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines())
            first = next(line for line in lines if not line.startswith("#"))
            yield os.path.relpath(file), re.split(r"[.:] ", first + " ")[0]

    return ["config", "is"], rows()


def models() -> tuple[list[str], Iterator[tuple[str, ...]]]:
    """Each model type, and the class of transformers whose weights it reads."""
    from ochat.model.families import FAMILIES, WRAPPERS

    classes = {name: (family.architecture, "") for name, family in FAMILIES.items()}
    classes |= {name: (wrapper[0], "its text model") for name, wrapper in WRAPPERS.items()}
    return ["model_type", "class", ""], ((name, *row) for name, row in classes.items())
