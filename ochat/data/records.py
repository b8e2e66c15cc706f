"""One record as a file holds it, and what is wrong with one that cannot be read.

Record("chats.jsonl", line, 1, b'{"messages": []}').value()

How a bad record is refused: rejected.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ochat.data.containers import kinds
from ochat.data.containers.json_text import explain
from ochat.errors import DataError
from ochat.text.fields import TWICE, place_of_twice, unique_keys
from ochat.text.records.keys import RECORD

DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
TO_LINES = "import json, sys; it = json.load(sys.stdin.buffer); [print(json.dumps(each)) for each in {}]"
TRANSPOSED = (
    "(dict(zip(it, row)) for row in zip(*(each.values() if isinstance(each, dict) else each for each in it.values())))"
)


@dataclass(frozen=True)
class Record:
    """One record as the file holds it; `error` says why it cannot be read."""

    file: str
    line: int  # of its first character, from 1; of Parquet the row
    number: int  # among the file's records, from 1
    data: bytes
    error: str = ""
    is_last: bool = False  # of a text, if that can be read: the only one that can be cut off
    condition: str = ""  # the class of the file's records that name none
    columns: Mapping[str, Any] = field(default_factory=dict)  # what the names of the file's folders add to the record

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"

    def value(self) -> dict[str, Any]:
        """The JSON object; for a list of messages, {"messages": the list}.

        Raises: DataError "file:line: what is wrong".
        """
        if self.error:
            raise DataError(f"{self.location}: {self.error}")
        try:
            text = self.data.decode("utf-8").lstrip("\ufeff")
            value = DECODER.decode(text)
            if isinstance(value, str) and value.lstrip().startswith(("{", "[")):  # a record that was encoded twice
                value = DECODER.decode(text := value)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.location}: {self._not_utf8(error)}") from error
        except DataError as error:
            place = place_of_twice(text)
            raise DataError(f"{self.location}: {f'{place}: {TWICE}' if place else error}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.location}: {explain(error, self.is_last)}") from error
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {"messages": value}
        if not isinstance(value, dict):
            raise DataError(f"{self.location}: a record must be a JSON object, not {type(value).__name__}")
        if self.is_last and self.number == 1 and (found := _records_in(value)):
            what, expression = found
            program = shlex.quote(TO_LINES.format(expression))
            raise DataError(
                f"{self.location}: {what}; make JSON Lines of it: {self._text()} | python -c {program} > NEW.jsonl"
            )
        for name, given in self.columns.items():
            if value.get(name) is None:
                value[name] = given
            elif str(value[name]) != str(given):
                raise DataError(
                    f"{self.location}: {name}: the record has another value than its folder, {name}={given}; rename "
                    "the folder, or take the key out"
                )
        return value

    def _text(self) -> str:
        """The command that prints the file's text."""
        with open(self.file, "rb") as file:
            packed = kinds.packing(file.read(16))
        return f"{kinds.TOOLS[packed]} -dc {shlex.quote(self.file)}" if packed else f"cat {shlex.quote(self.file)}"

    def _not_utf8(self, error: UnicodeDecodeError) -> str:
        found = f"not UTF-8 at byte {error.start} of the record (0x{error.object[error.start]:02x})"
        remedy = f"{self._text()} | iconv -f WINDOWS-1252 -t UTF-8 > NEW.jsonl"
        return f"{found}: damaged, or of another encoding; if that is WINDOWS-1252, this makes UTF-8: {remedy}"


_CONVERSES = {
    name: meaning for name, meaning in RECORD.meanings.items() if meaning in ("messages", "question", "answer")
}


def _records_in(value: dict[str, Any]) -> tuple[str, str] | None:
    """What a file holds that is one object but no record, and the expression that gives its records; else None."""
    if not value:
        return None
    if not _CONVERSES.keys().isdisjoint(value):
        return ("the table is written by columns", TRANSPOSED) if _has_columns(value) else None
    if all(map(_converses, value.values())):
        return "the records lie under keys of their own", "it.values()"
    lists = [key for key, item in value.items() if isinstance(item, list) and item and _converses(item[0])]
    return (f"the records lie under {', '.join(map(repr, lists))}", f"it[{lists[0]!r}]") if lists else None


def _has_columns(value: dict[str, Any]) -> bool:
    """Whether each value is one of every record: a list, or what pandas writes, {"0": ..., "1": ...}."""
    columns = [list(item.values()) if isinstance(item, dict) and "0" in item else item for item in value.values()]
    if not all(isinstance(column, list) and column for column in columns):
        return False
    said = (column[0] for key, column in zip(value, columns, strict=True) if key in _CONVERSES)
    return any(
        isinstance(first, str) or (isinstance(first, list) and bool(first) and isinstance(first[0], dict))
        for first in said
    )


def _converses(value: Any) -> bool:
    return isinstance(value, dict) and not _CONVERSES.keys().isdisjoint(value)
