"""The fields of one object of a record, found by what they mean, whatever keys they have.

    fields = read_fields({"from": "human", "id": 7}, MESSAGE, notes)
    fields.text("role"), notes.ignored         # "human", {"message.id": 1}

Errors begin with the key that the object has; the caller puts the object's place in front.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ochat.errors import DataError
from ochat.text.attributes import AttributeFormat
from ochat.text.fields import check_list, check_number, check_text, describe, shorten
from ochat.text.records.keys import RECORD
from ochat.text.records.levels import IGNORE, Level, has_content

NO_COLUMNS: Mapping[str, str] = {}
_SWITCHES = ("on", "off", "yes", "no", "true", "false", "none", "low", "medium", "high")


@dataclass
class Notes:
    """What reading records found that is not part of a conversation."""

    ignore: frozenset[str] = frozenset()  # keys to leave out, as Level.ignores reads them
    ignored: Counter[str] = field(default_factory=Counter)  # key as Level.shown names it -> objects that have it


@dataclass(slots=True)
class Fields:
    """The values of an object by meaning, and the keys that it has for them; null ones are absent."""

    level: Level
    record: dict[str, Any]
    names: dict[str, str]
    values: dict[str, Any]
    columns: Mapping[str, str]  # as read_fields takes them
    notes: Notes

    def __contains__(self, meaning: str) -> bool:
        return meaning in self.values

    def name(self, meaning: str) -> str:
        """The key that the object has, else the one that a map names, else the first of the table."""
        mapped = (name for name, meant in self.columns.items() if meant == meaning)
        return self.names.get(meaning) or next(mapped, "") or self.level.names(meaning)[0]

    def text(self, meaning: str, *, required: bool = False) -> str:
        """The text, "" if it may be missing and is. Raises: DataError."""
        value = self.values.get(meaning)
        if value is None:
            if required:
                raise DataError(f"{self.name(meaning)}: missing or null{self.others()}")
            return ""
        return check_text(value, self.names[meaning])

    def number(self, meaning: str) -> float | None:
        """The finite number, None if it is missing. Raises: DataError."""
        if meaning not in self.values:
            return None
        value = self.values[meaning]
        if isinstance(value, bool):
            raise DataError(f"{self.names[meaning]}: expected a number, got {describe(value)}")
        return check_number(value, self.names[meaning])

    def condition(self, attributes: AttributeFormat) -> str | None:
        """The class, None if it is missing; an object of attributes as they are written. Raises: DataError."""
        value = self.values.get("condition")
        if isinstance(value, dict):
            return attributes.text(value, self.names["condition"])
        return None if value is None else check_text(value, self.names["condition"])

    def list(self, meaning: str) -> list[Any]:
        """The list, empty if it is missing; JSON text is read. Raises: DataError."""
        return check_list(self.values[meaning], self.names[meaning]) if meaning in self.values else []

    def weight(self) -> float | None:
        """The weight times whether it is trained, None if neither is given. Raises: DataError."""
        weight = check_number(self.values["weight"], self.names["weight"]) if "weight" in self.values else None
        if "trained" not in self.values:
            return weight
        trained = check_truth(self.values["trained"], self.names["trained"])
        return trained if weight is None else trained * weight

    def reasoning(self) -> str:
        """What is thought, "" if it is missing. Raises: DataError for a word that says whether to think."""
        text = self.text("reasoning")
        if text.strip().lower() in _SWITCHES:
            raise self.refusal("reasoning", f"{describe(text)} says how much to reason, not what")
        return text

    def leave_out(self, meaning: str) -> None:
        """Count a key that is not read."""
        self.notes.ignored[self.level.shown(self.names[meaning])] += 1

    def refusal(self, meaning: str, why: str) -> DataError:
        """What to raise for a key that cannot be read, but be ignored."""
        return self.level.refusal(self.name(meaning), why)

    def check_label(self) -> None:
        """Count a label that is metadata. Raises: DataError for one that says which answers are good."""
        if "label" not in self.values:
            return
        name, value = self.names["label"], self.values["label"]
        if isinstance(value, int | float) and value in (0, 1):
            good, bad = (describe(type(value)(truth)) for truth in (1, 0))  # as the column writes them
            rule = f'condition = {{from = "{name}", values = {{"{good}" = "GPT4", "{bad}" = "GPT3"}}}}'
            remedy = f"give it a class with --map: {rule}" if self.level is RECORD else "write weight"
            raise self.refusal("label", f"{describe(value)} says whether the answer is good; {remedy}")
        self.leave_out("label")

    def others(self) -> str:
        """The keys that the object has, for messages."""
        there = (name for name, value in self.record.items() if value is not None)
        shown = ", ".join(repr(shorten(name)) for name in itertools.islice(there, 8))
        return f"; there is {shown}" if shown else ""


def check_truth(value: Any, place: str) -> float:
    """1 or 0 for true, false, 1 or 0. Raises: DataError for all else, such as a loss that somebody measured."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    raise DataError(f"{place}: expected true, false, 1 or 0, got {describe(value)}; other weights are named weight")


def read_fields(record: dict[str, Any], level: Level, notes: Notes, columns: Mapping[str, str] = NO_COLUMNS) -> Fields:
    """The fields that are read; all others are counted in `notes`. `columns`: more keys of the level, and what they
    mean.

    Raises: DataError for a key that is refused or misspelt, and for two of one meaning with different values.
    """
    names: dict[str, str] = {}
    values: dict[str, Any] = {}
    meanings = {} if columns or notes.ignore else level.meanings
    for name, value in record.items():
        if value is None:
            continue
        meaning = meanings.get(name) or _meaning(name, value, level, notes, columns)
        if not meaning:
            notes.ignored[level.shown(name)] += 1
        elif meaning not in values:
            names[meaning], values[meaning] = name, value
        elif not has_content(value) or not has_content(values[meaning]):  # uniform rows have keys that say nothing
            said, blank = (name, names[meaning]) if has_content(value) else (names[meaning], name)
            names[meaning], values[meaning] = said, record[said]
            notes.ignored[level.shown(blank)] += 1
        elif values[meaning] != value:
            first = f"{names[meaning]} says the same thing, with another value"
            raise level.refusal(name, f"{first}; keep it with {IGNORE} {level.shown(names[meaning])}")
    return Fields(level, record, names, values, columns, notes)


def _meaning(name: str, value: Any, level: Level, notes: Notes, columns: Mapping[str, str]) -> str:
    """What a key means, "" for one to leave out. Raises: DataError."""
    if not isinstance(name, str):
        raise DataError(f"{describe(name)}: a key must be text")
    if name in columns:
        return columns[name]
    if level.ignores(name, notes.ignore):
        return ""
    return level.meaning(name, value)
