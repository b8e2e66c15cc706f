"""Checks of the fields of a record: each returns a value of the wanted type, or names the field that is wrong.

    text = text_field(record, "instruction", "instruction", required=True)

null means the same as a missing key, in every field.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ochat.errors import DataError

OTHER_TYPE = "\0type"  # the one key of an object that stands for a value of a column; its value names the column's type
TWICE = "the key comes twice in one object; keep one of the two"
LONGEST_NAME = 40  # a key of megabytes is no field's name, and difflib would take minutes to say so
LONGEST_PLACE = 800  # of a key that comes twice
DEEPEST = 64  # of objects and lists in one another that chat templates write
_KINDS: dict[type, str] = {type(None): "null", str: "text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class OtherType:
    """A value that JSON cannot hold, such as a date of a Parquet file. As metadata it is as good as any other."""

    name: str


def check_object(value: Any, place: str) -> dict[str, Any]:
    """`value`. Raises: DataError unless it is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, got {describe(value)}")
    return value


def check_list(value: Any, place: str) -> list[Any]:
    """The list, also of its JSON text, of which blank text is an empty one, and `as_rows`.

    Raises: DataError unless it is a list.
    """
    if isinstance(value, str):
        value = from_json(value, place) if value.strip() else []
    value = as_rows(value, place)
    if not isinstance(value, list):
        raise DataError(f"{place}: expected a list, got {describe(value)}")
    return value


def as_rows(value: Any, place: str) -> Any:
    """The list of objects that an object of lists stands for, as `datasets` keeps a sequence of them; else the value.

    {"role": ["user"], "content": ["Hi"]} is [{"role": "user", "content": "Hi"}].

    Raises: DataError for lists of different lengths.
    """
    columns = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if not columns or not all(isinstance(item, list) for item in columns.values()):
        return value
    lengths = {shorten(key): len(item) for key, item in columns.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in itertools.islice(lengths.items(), 8))
        raise DataError(f"{place}: lists of different lengths that should be those of its objects: {shown}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def from_json(text: str, place: str) -> Any:
    """What a JSON text holds. Raises: DataError."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected JSON, got other text ({error})") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> Any:
    """The object of a JSON decoder's pairs, or what it stands for. Raises: DataError for a key that comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise DataError(f"{shorten(twice)}: {TWICE}")
    return OtherType(str(found[OTHER_TYPE])) if OTHER_TYPE in found else found


def place_of_twice(text: str) -> str:
    """Where the JSON text of a record has a key twice, such as "items[0].content"; "" if that cannot be told."""
    try:
        return _twice(json.loads(text, object_pairs_hook=_object_or_twice)).removeprefix(".")[-LONGEST_PLACE:]
    except (ValueError, RecursionError):  # further on
        return ""


class _Twice(str):
    """The place of a key that comes twice, in place of the object that it is in."""


def _object_or_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Twice:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found or (below := _twice(value)):
            return _Twice(f".{shorten(key)}{'' if key in found else below}")
        found[key] = value
    return found


def _twice(value: Any) -> str:
    """The place in a value of a key that comes twice, "" if there is none."""
    if isinstance(value, list):
        return next((f"[{i}]{place}" for i, item in enumerate(value) if (place := _twice(item))), "")
    return value if isinstance(value, _Twice) else ""


def check_json(value: Any, place: str, depth: int = DEEPEST) -> Any:
    """The value that JSON can hold, without null fields of objects, which Parquet cannot tell from missing ones.

    Raises: DataError for anything that a chat template could not write.
    """
    if depth == 0:
        raise DataError(f"{place}: objects and lists are nested more than {DEEPEST} deep")
    if isinstance(value, str):
        return check_text(value, place)
    if isinstance(value, list):
        return [None if item is None else check_json(item, place, depth - 1) for item in value]
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None}
        return {check_text(key, place): check_json(item, place, depth - 1) for key, item in kept.items()}
    check_number(value, place)
    return value


def check_text(value: Any, place: str) -> str:
    """`value`. Raises: DataError unless it is valid Unicode text."""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, got {describe(value)}")
    if not value.isascii():  # which Python knows at once
        check_unicode(value, f"{place}: ")
    return value


def text_field(record: dict[str, Any], key: str, place: str, *, required: bool = False) -> str:
    """The text under `key` ("" when it may be missing and is). Raises: DataError."""
    if record.get(key) is None:
        if required:
            raise DataError(f"{place}: {'null' if key in record else 'missing' + nearest(key, record)}")
        return ""
    return check_text(record[key], place)


def check_unicode(text: str, place: str = "") -> None:
    """Raises: DataError, which begins with `place`, for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}a lone surrogate at character {error.start}; it is no valid Unicode text") from None


def has_surrogate(text: str) -> bool:
    """Whether it is no valid Unicode text; for a path, whose bytes are no UTF-8."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def check_number(value: Any, place: str) -> float:
    """The finite number; true is 1 and false is 0. Raises: DataError."""
    if not isinstance(value, (bool, int, float)):
        raise DataError(f"{place}: expected a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise DataError(f"{place}: too large for a float") from None
    if not math.isfinite(number):
        raise DataError(f"{place}: expected a finite number, got {number}")
    return number


def describe(value: Any) -> str:
    """A JSON value for messages: a number or a boolean as it is, of others the kind, and a text that is short."""
    if isinstance(value, OtherType):
        return f"{value.name}, which JSON lacks: cast the column to text or to a number"
    if isinstance(value, int) and value.bit_length() > 128:  # Python does not write numbers of thousands of digits
        return "a number too large to be shown"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = _KINDS.get(type(value), type(value).__name__)
    return f"{kind} ({value!r})" if isinstance(value, str) and len(value) <= LONGEST_NAME else kind


def shorten(name: str) -> str:
    """A key as messages show it."""
    return name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "..."


def nearest(key: str, keys: Iterable[str]) -> str:
    """ " (there is 'kez')" for one of the keys that is close to `key`, else ""."""
    near = [k for k in itertools.islice(keys, 100) if len(k) <= LONGEST_NAME]
    close = difflib.get_close_matches(key, near, n=1)
    return f" (there is {close[0]!r})" if close else ""
