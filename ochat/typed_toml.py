"""TOML as typed dataclasses: strict about keys and types, with the nearest known key in the message.

    tree = read(Path("run.toml")); apply(tree, "--optim.lr=2e-5"); config = build(Config, tree)

Knows no section by name: a dataclass's fields and annotations are the schema. Understands str, int, float, bool,
Literal, unions, tuples (arrays), dict[str, T] (tables) and dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import reprlib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ochat.errors import ConfigError

MAX_BYTES = 1 << 22  # a configuration has a few thousand


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises: ConfigError where it is missing or no TOML."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        expect(len(content) <= MAX_BYTES, str(path), "a file", f"at most {MAX_BYTES:,} bytes of TOML")
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, RecursionError) as error:  # no TOML; numbers of thousands of digits; deep nesting
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


class OptionText(str):
    """A value as it stood on the command line: text where text is wanted, TOML everywhere else."""

    def typed(self, kind: Any) -> Any:
        """What it means for `kind`: a TOML value if it is one, else the text; for str, 2024 and true are texts too."""
        try:
            value = tomllib.loads(f"value = {self}")["value"]
        except (ValueError, RecursionError):
            return str(self)
        return value if isinstance(value, str) or kind is not str else str(self)


def apply(tree: dict[str, Any], option: str) -> None:
    """Sets what `--section.key=value` says; a key with dots or blanks is quoted, as in TOML. Raises: ConfigError."""
    name, equals, text = option.removeprefix("--").partition("=")
    parents, key = _split_name(name)
    if not option.startswith("--") or not equals or not parents:
        raise ConfigError(f"option {option!r}: expected --section.key=value, for example --optim.lr=2e-5")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"option {option!r}: {parent} is a value, not a section")
    tree[key] = OptionText(text)


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a file's tables under its dotted name; an empty table is a value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _split_name(name: str) -> tuple[list[str], str]:
    """A dotted name as its sections and its key."""
    try:
        tree, path = tomllib.loads(f"{name} = 0"), []
    except (ValueError, RecursionError):
        *parents, key = name.split(".")
        return parents, key
    while isinstance(tree, dict):
        (key, tree), *_ = tree.items()
        path.append(key)
    return path[:-1], path[-1]


def build(kind: Any, value: Any, where: str = "") -> Any:
    """`value` (from TOML) as the type `kind`. Raises: ConfigError naming `where`, the dotted name, and the value."""
    if isinstance(value, OptionText):
        value = value.typed(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict:
        expect(isinstance(value, dict), where, value, "a table")
        return {key: build(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        expect(isinstance(value, list), where, value, 'an array, such as ["a", "b"]' if args[0] is str else "an array")
        expect(args[-1] is Ellipsis or len(args) == len(value), where, value, f"an array of {len(args)}")
        return tuple(build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        return _build_union(args, value, where)
    if origin is Literal:
        expect(value in args, where, value, "one of " + ", ".join(map(repr, args)))
        return value
    if type(value) is int:
        expect(abs(value) < 1 << 63, where, value, "a number of 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    expect(type(value) is kind, where, value, _described(kind))
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    expect(isinstance(value, dict), where or "the file", value, "a table")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(hints)
            raise ConfigError(f"unknown {'key' if where else 'section'} {_join(where, key)!r}; {hint}")
    return kind(**{key: build(hints[key], item, _join(where, key)) for key, item in value.items()})


def _build_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in args:
        try:
            return build(kind, value, where)
        except ConfigError:
            continue
    expect(False, where, value, " or ".join(_described(kind) for kind in args if kind is not type(None)))


def _described(kind: Any) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    if typing.get_origin(kind) is tuple:
        return "an array"
    return names[kind] if kind in names else " or ".join(map(repr, typing.get_args(kind)))


def expect(condition: bool, where: str, value: Any, expected: str) -> None:
    """Raises ConfigError "where = value: expected ..." unless the condition holds."""
    if not condition:
        shown = reprlib.Repr()
        shown.maxstring = shown.maxother = shown.maxlong = shown.maxdict = 200
        raise ConfigError(f"{where} = {shown.repr(value)}: expected {expected}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def section(path: Sequence[str], values: Any) -> str:
    """A dataclass as one TOML table under the dotted `path`; None, which TOML lacks, is left out."""
    lines = [f"[{'.'.join(map(_key, path))}]"]
    for entry in dataclasses.fields(values):
        value = getattr(values, entry.name)
        if value is not None:
            lines.append(f"{entry.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        value = {key: item for key, item in value.items() if item is not None}
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    """A TOML string: JSON's escapes are TOML's, except that TOML wants DEL escaped too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
