"""TOML tables, `--section.key=value` options over them, and strict structs made of both.

    tree = read_toml(Path("run.toml")); apply(tree, "--optim.lr=2e-5", Config); config = build(Config, tree)

Knows no section by name: a msgspec struct is the schema. Every refusal names the file or the dotted key, the value,
what was expected and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import functools
import math
import reprlib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from ochat.errors import ConfigError

T = TypeVar("T")
MAX_BYTES = 1 << 22  # a configuration has a few thousand
BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "up to"}  # of numbers
HIGHEST_NAMED = 2**31  # a bound beyond this is the largest value of a type


class UnknownKey(ConfigError):
    """A key that its table does not have; `near`: one that it has and that is spelled alike, or ""."""

    def __init__(self, name: str, where: str, near: str, known: Sequence[str]):
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {'key' if where else 'section'} {name!r}; {hint}")
        self.name = name


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises: ConfigError if it is missing or invalid."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        expect(len(content) <= MAX_BYTES, str(path), "a file", f"at most {MAX_BYTES:,} bytes of TOML")
        return tomllib.loads(content.decode("utf-8").replace("\r\n", "\n"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, RecursionError) as error:  # invalid TOML; numbers of thousands of digits; deep nesting
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line as the command's own arguments and `--section.key=value` options, also from `--section.key value`.

    An option has a dot in its name. Raises: ConfigError for an option without a value.
    """
    own: list[str] = []
    options: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(argument)
        elif equals:
            options.append(argument)
        else:
            value = next(rest, "--")
            expect(not value.startswith("--"), argument, "", "a value, as in --section.key=value")
            options.append(f"{argument}={value}")
    return own, options


def apply(tree: dict[str, Any], option: str, schema: Any) -> None:
    """Sets what `--section.key=value` says. A table name with dots is quoted, as in TOML. Raises: ConfigError.

    The value is TOML if it can be, else text; where the schema wants text, 2024 and true are text too.
    """
    name, equals, text = option.removeprefix("--").partition("=")
    path = dotted_path(name)
    if not option.startswith("--") or not equals or len(path) < 2:
        raise ConfigError(f"option {option!r}: expected --section.key=value, for example --optim.lr=2e-5")
    for parent in path[:-1]:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"option {option!r}: {parent} is a value, not a section")
    kind = functools.reduce(_key_type, path, schema)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        if str in (kind, *typing.get_args(kind)):
            msgspec.convert(value, kind)
    except (ValueError, RecursionError, msgspec.ValidationError):  # no TOML, or of another type
        value = text
    tree[path[-1]] = value


def dotted_path(name: str) -> list[str]:
    """The parts of a dotted name, of which those with dots are quoted, as in TOML: classes."gpt-3.5".weight."""
    path: list[str] = []
    try:
        tree = tomllib.loads(f"{name} = 0")
        while tree:
            [(key, tree)] = tree.items()
            path.append(key)
    except (ValueError, AttributeError, RecursionError):  # no TOML, or more than a name
        return name.split(".")
    return path


def build(kind: type[T], value: Any, where: str = "") -> T:
    """TOML's `value` as the type `kind`. Raises: ConfigError naming `where`, the dotted name, and the value."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:  # its path lacks the names of tables: find the part that is wrong
        _build_parts(kind, value, where)
        expect(False, where or "the file", value, in_words(kind))
        raise


def in_words(kind: Any) -> str:
    """A type as help and refusals name it, for example "a whole number above 0"."""
    return _in_words(inspect.type_info(kind))


def expect(condition: bool, where: str, value: Any, expected: str) -> None:
    """Raises ConfigError "where = value: expected ..." unless the condition holds."""
    if not condition:
        shown = reprlib.Repr()
        shown.maxstring = shown.maxother = shown.maxlong = shown.maxdict = 200
        raise ConfigError(f"{where} = {shown.repr(value)}: expected {expected}")


def at_least(options: object, **bounds: float) -> None:
    """Raises ConfigError for an option of a command below its bound, or not finite. None: it was not given."""
    for name, least in bounds.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least {least} is needed")


def _key_type(kind: Any, key: str) -> Any:
    """The type of a table's key; None where `kind` is no table or has no such key."""
    if typing.get_origin(kind) is dict:
        return typing.get_args(kind)[1]
    return _keys(kind).get(key)


def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a table as a file names them, with their types; none where `kind` is no table."""
    if not hasattr(kind, "__struct_fields__"):
        return {}
    return {field.encode_name: field.type for field in msgspec.structs.fields(kind)}


def _build_parts(kind: Any, value: Any, where: str) -> None:
    """Builds what a table or array holds. Raises: ConfigError for a part that is wrong and for an unknown key."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    args = typing.get_args(kind)
    if isinstance(value, dict):
        for key, item in value.items():
            name = f"{where}.{key}" if where else key
            if (part := _key_type(kind, key)) is not None:
                build(part, item, name)
            elif known := tuple(_keys(kind)):
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                raise UnknownKey(name, where, near[0] if near else "", known)
    elif typing.get_origin(kind) is tuple and isinstance(value, list) and (... in args or len(value) == len(args)):
        for place, item in enumerate(value):
            build(args[0], item, f"{where}[{place}]")


def _in_words(kind: inspect.Type) -> str:
    match kind:
        case inspect.UnionType():
            return " or ".join(_in_words(each) for each in kind.types if not isinstance(each, inspect.NoneType))
        case inspect.LiteralType():
            return ("one of " if len(kind.values) > 1 else "") + ", ".join(map(repr, kind.values))
        case inspect.IntType() | inspect.FloatType():
            limits = {word: getattr(kind, name) for name, word in BOUNDS.items()}
            named = [
                f" {word} {limit}" for word, limit in limits.items() if limit is not None and limit < HIGHEST_NAMED
            ]
            return ("a whole number" if isinstance(kind, inspect.IntType) else "a number") + "".join(named)
        case inspect.VarTupleType():
            example = ', such as ["a", "b"]' if isinstance(kind.item_type, inspect.StrType) else ""
            return f"an array{' of at least one' if kind.min_length else ''}{example}"
        case inspect.TupleType():
            return f"an array of {len(kind.item_types)}"
    return {inspect.StrType: "a string", inspect.BoolType: "true or false"}.get(type(kind), "a table")
