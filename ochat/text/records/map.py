"""`--map FILE.toml`: which columns of a record are its messages, class, reward and weight.

messages = "dialog"                       # the column with the list; role and content: the keys of its messages
role = "speaker"
content = "said"
roles = {Teacher = "assistant"}           # names of roles that are not known
condition = {from = "model", values = {"gpt-4*" = "GPT4", "*" = "GPT3"}}     # or "column"
reward = "score"
ignore = ["label"]                        # keys to leave out, as --ignore names them

Columns that each hold one answer to the record's prompt get their classes by name, in place of `condition`:

[answers]
chosen = "GPT4"
rejected = "GPT3"
"""

from __future__ import annotations

import bisect
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from ochat import overrides
from ochat.errors import ConfigError, DataError
from ochat.text.fields import check_number, check_text, describe, nearest
from ochat.text.records.messages import ROLES

COLUMNS = (
    *("messages", "question", "extra", "answer", "reasoning", "tool_calls", "history", "system"),
    *("reward", "weight", "weights", "tools"),
)


class ClassRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"column": "from"}):
    """How a column's value becomes a class: as it is, by patterns, or by the bin that a number falls into."""

    column: str
    values: dict[str, str] = {}  # pattern with * and ? -> class; the first that matches counts
    bins: tuple[float, ...] = ()  # rising limits; a value equal to a limit belongs to the upper bin
    names: tuple[str, ...] = ()  # classes of the bins, one more than limits

    def __post_init__(self) -> None:
        if self.values and self.bins:
            raise ValueError("condition: give values or bins, not both")
        if len(self.names) != (len(self.bins) + 1 if self.bins else 0):
            needed = f"{len(self.bins)} bins need {len(self.bins) + 1} names" if self.bins else "names need bins"
            raise ValueError(f"condition: {needed}, got {len(self.names)} names")
        if list(self.bins) != sorted(set(self.bins)) or not all(map(math.isfinite, self.bins)):
            raise ValueError("condition: bins must rise")

    def of(self, value: Any) -> str:
        """The class. Raises: DataError for a value that no pattern matches, or that is no number where bins are."""
        if self.bins:
            return self.names[bisect.bisect_right(self.bins, check_number(value, self.column))]
        if not isinstance(value, str):
            if not isinstance(value, bool | int | float):
                raise DataError(f"{self.column}: {describe(value)} is no class")
            check_number(value, self.column)
            value = json.dumps(value)  # true as JSON writes it
        if not self.values:
            return check_text(value, self.column)
        for pattern, name in self.values.items():
            if fnmatchcase(value, pattern):
                return name
        shown = describe(value)
        raise DataError(f'{self.column}: the map has no class for {shown}; add it, or "*", to condition.values')


class RecordMap(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a map file. A string names a column; "" stands for the table of keys."""

    messages: str = ""
    role: str = ""  # of a message, as content is
    content: str = ""
    roles: dict[str, str] = {}  # names of roles that are not known -> user, assistant, system or tool
    question: str = ""
    extra: str = ""
    answer: str = ""
    reasoning: str = ""
    tool_calls: str = ""
    history: str = ""
    system: str = ""
    reward: str = ""
    weight: str = ""
    weights: str = ""
    tools: str = ""
    condition: str | ClassRule = ""
    answers: dict[str, str] = {}
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, role in self.roles.items():
            if role not in ROLES:
                raise ValueError(f"roles.{name}: {role!r} is no role; known: {', '.join(ROLES)}")
        if self.condition and any(self.answers.values()):
            raise ValueError("condition, answers: both give classes; take one of the two out")
        named = [column for column in (getattr(self, name) for name in COLUMNS) if column]
        if twice := [column for column in named if named.count(column) > 1 or column in self.answers]:
            raise ValueError(f"{twice[0]}: the map reads this column as two things")

    @property
    def class_rule(self) -> ClassRule | None:
        """How the class is found, None where the record's own `condition` is it."""
        if isinstance(self.condition, ClassRule):
            return self.condition
        return ClassRule(self.condition) if self.condition else None

    def columns(self) -> dict[str, str]:
        """What each column means that the map names."""
        return {column: name for name in COLUMNS if (column := getattr(self, name))}

    def named(self) -> frozenset[str]:
        """Every column of records that the map names."""
        rule = self.class_rule
        return frozenset([*self.columns(), *self.answers, *([rule.column] if rule else [])])

    def message_columns(self) -> dict[str, str]:
        """The same of the keys of messages."""
        return {column: name for name in ("role", "content") if (column := getattr(self, name))}


def load(path: str | Path) -> RecordMap:
    """The map in a TOML file. Raises: ConfigError naming the key."""
    if not Path(path).is_file():
        raise ConfigError(f"--map {path}: no such file; `ochat prepare --describe FILE` writes a first version")
    found = overrides.read_toml(Path(path))
    _check_keys(found, RecordMap, f"{path}: ")
    if isinstance(rule := found.get("condition"), dict):
        _check_keys(rule, ClassRule, f"{path}: condition.")
    try:
        return msgspec.convert(found, RecordMap)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None


def _check_keys(table: dict[str, Any], kind: type[msgspec.Struct], place: str) -> None:
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    for key in table:
        if key not in names:
            raise ConfigError(f"{place}{key}: unknown key{nearest(key, names)}; known: {', '.join(names)}")
