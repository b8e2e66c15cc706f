"""Writes docs/configuration.md and docs/ochat.schema.json from ochat/config.py:
`PYTHONPATH=. python docs/config_page.py`.

tests/test_docs.py fails while the page is not what this makes of the code.
"""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec

from ochat import config
from ochat.commands import schema

PAGE = Path(__file__).with_name("configuration.md")
SCHEMA = Path(__file__).with_name("ochat.schema.json")
HEAD = """# Every config key

A config is a TOML file. Any key can also be given on the command line, as `--section.key=value` or
`--section.key value`. A key that is left out has its default. An unknown key is refused with the nearest known one.
`ochat train --help-all` prints the same list.

This page is made from `ochat/config.py` by `docs/config_page.py`.
"""


def page() -> str:
    """The page: a table for each section."""
    parts = [HEAD]
    for section in msgspec.structs.fields(config.Config):
        is_named = typing.get_origin(section.type) is dict  # a table of tables
        kind = typing.get_args(section.type)[1] if is_named else section.type
        parts.append(table(section.name, kind, ".NAME" * is_named))
        if section.name == "data":
            parts.append(table("data.mix", config.MixConfig, ".NAME"))
        if section.name == "loss":
            parts.append(table("loss.stage2", config.StageConfig, ""))
    return "\n".join(parts)


def is_section(kind: Any) -> bool:
    """Whether a key is a section of its own."""
    return isinstance(kind, type) and issubclass(kind, config.Section)


def table(name: str, kind: type[config.Section], suffix: str) -> str:
    """A heading, what the section is, and a row for each key: default, choices, meaning."""
    explained = config.explanations(kind)
    lines = [
        f"## `[{name}{suffix}]`",
        "",
        inspect.getdoc(kind) or "",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    for field in msgspec.structs.fields(kind):
        if is_section(field.type):
            continue
        choices = words(field.type)
        meaning = explained[field.encode_name] + (f" ({', '.join(f'`{word}`' for word in choices)})" if choices else "")
        lines.append(f"| `{field.encode_name}` | {default(field)} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def default(field: msgspec.structs.FieldInfo) -> str:
    """The default as TOML, or a word where there is none."""
    value = field.default if field.default is not msgspec.NODEFAULT else None
    if value is None:
        return "not set"
    return f"`{str(value).lower() if isinstance(value, bool) else msgspec.json.encode(value).decode()}`"


def words(kind: Any) -> list[str]:
    """The words that a value may be."""
    if typing.get_origin(kind) is Literal:
        return [word for word in typing.get_args(kind) if isinstance(word, str)]
    return [word for part in typing.get_args(kind) for word in words(part)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    SCHEMA.write_text(schema.text(), encoding="utf-8")
