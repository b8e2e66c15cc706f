"""TOML tables, `--section.key=value` options over them, and strict structs made of both.

    tree = read_toml(Path("run.toml")); apply(tree, "--optim.lr=2e-5", Config); config = build(Config, tree)

Knows no section by name: a msgspec struct is the schema. Every refusal names the file or the dotted key, the value,
what was expected and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import tomli_w
from msgspec import inspect

from ochat.errors import ConfigError

T = TypeVar("T")
MAX_BYTES = 1 << 22  # a configuration has a few thousand


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
    path = _path(name)
    if not option.startswith("--") or not equals or len(path) < 2:
        raise ConfigError(f"option {option!r}: expected --section.key=value, for example --optim.lr=2e-5")
    for parent in path[:-1]:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"option {option!r}: {parent} is a value, not a section")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    kind = _kind(schema, path)
    takes_text = str in (kind, *typing.get_args(kind))
    tree[path[-1]] = text if takes_text and not _is_valid(kind, value) else value


def build(kind: type[T], value: Any, where: str = "", renamed: Mapping[str, str] | None = None) -> T:
    """TOML's `value` as the type `kind`. Raises: ConfigError naming `where`, the dotted name, and the value.

    `renamed`: keys of earlier versions and their new names, `*` for a table's name.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:  # its path lacks the names of tables: find the part that is wrong
        for part, item, name in _parts(kind, value, where, renamed or {}):
            build(part, item, name, renamed)
        expect(False, where or "the file", value, _described(inspect.type_info(kind)))
        raise


def rename(tree: dict[str, Any], renamed: Mapping[str, str], where: str = "") -> dict[str, Any]:
    """The tables with the keys of earlier versions under their new names."""
    changed = {}
    for key, value in tree.items():
        name = _join(where, key)
        new = next((new.rpartition(".")[2] for old, new in renamed.items() if _matches(name, old)), key)
        changed[new] = rename(value, renamed, name) if isinstance(value, dict) else value
    return changed


def to_toml(value: Any) -> str:
    """A value as TOML writes it after `key =`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    return tomli_w.dumps({"": value}).partition(" = ")[2].rstrip()


def metavar(kind: Any) -> str:
    """A type as help shows it: words that a key takes, or the kind of value."""
    return _metavar(inspect.type_info(kind))


def expect(condition: bool, where: str, value: Any, expected: str) -> None:
    """Raises ConfigError "where = value: expected ..." unless the condition holds."""
    if not condition:
        shown = reprlib.Repr()
        shown.maxstring = shown.maxother = shown.maxlong = shown.maxdict = 200
        raise ConfigError(f"{where} = {shown.repr(value)}: expected {expected}")


def _path(name: str) -> list[str]:
    """The parts of a dotted name."""
    try:
        tree, path = tomllib.loads(f"{name} = 0"), []
    except (ValueError, RecursionError):
        return name.split(".")
    while isinstance(tree, dict):
        (key, tree), *_ = tree.items()
        path.append(key)
    return path


def _kind(schema: Any, path: Sequence[str]) -> Any:
    """The type of the key at `path`; None where the schema has none."""
    for key in path:
        if typing.get_origin(schema) is dict:
            schema = typing.get_args(schema)[1]
        else:
            schema = typing.get_type_hints(schema).get(key) if isinstance(schema, type) else None
    return schema


def _is_valid(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _parts(kind: Any, value: Any, where: str, renamed: Mapping[str, str]) -> Iterator[tuple[Any, Any, str]]:
    """What a table or array holds: type, value and dotted name of each part. Raises: ConfigError for unknown keys."""
    if typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        yield from ((args[1], item, _join(where, key)) for key, item in value.items())
    elif origin is tuple and isinstance(value, list) and (args[-1] is Ellipsis or len(args) == len(value)):
        yield from ((args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        hints = typing.get_type_hints(kind, include_extras=True)
        for key in value:
            if key not in hints:
                raise ConfigError(_unknown(where, key, list(hints), renamed))
        yield from ((hints[key], item, _join(where, key)) for key, item in value.items())


def _unknown(where: str, key: str, known: Sequence[str], renamed: Mapping[str, str]) -> str:
    name = _join(where, key)
    for old, new in renamed.items():
        if _matches(name, old):
            return f"{name} was renamed {_join(where, new.rpartition('.')[2])}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(known)
    return f"unknown {'key' if where else 'section'} {name!r}; {hint}"


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) is not None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _metavar(kind: Any) -> str:
    match kind:
        case inspect.Metadata():
            return _metavar(kind.type)
        case inspect.UnionType():
            return "|".join(_metavar(each) for each in kind.types if not isinstance(each, inspect.NoneType))
        case inspect.LiteralType():
            return "{" + ",".join(map(str, kind.values)) + "}"
        case inspect.DictType():
            return _metavar(kind.value_type)
    names = {inspect.IntType: "INT", inspect.FloatType: "FLOAT", inspect.BoolType: "{true,false}"}
    return names.get(type(kind), "ARRAY" if "Tuple" in type(kind).__name__ else "TEXT")


def _described(kind: Any) -> str:
    """A type in words."""
    match kind:
        case inspect.Metadata():
            return _described(kind.type)
        case inspect.UnionType():
            return " or ".join(_described(each) for each in kind.types if not isinstance(each, inspect.NoneType))
        case inspect.LiteralType():
            return ("one of " if len(kind.values) > 1 else "") + ", ".join(map(repr, kind.values))
        case inspect.IntType() | inspect.FloatType():
            what = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
            return f"{what} {_bounds(kind)}".strip()
        case inspect.VarTupleType():
            least = " of at least one" if kind.min_length else ""
            return (
                f'an array{least}, such as ["a", "b"]'
                if isinstance(kind.item_type, inspect.StrType)
                else f"an array{least}"
            )
        case inspect.TupleType():
            return f"an array of {len(kind.item_types)}"
    names = {inspect.StrType: "a string", inspect.BoolType: "true or false"}
    return names.get(type(kind), "a table")


def _bounds(kind: Any) -> str:
    above = f"above {kind.gt}" if kind.gt is not None else f"from {kind.ge}" if kind.ge is not None else ""
    below = f"below {kind.lt}" if kind.lt is not None else f"up to {kind.le}" if (kind.le or 9) < 2**31 else ""
    return f"{above} {below}".strip()
