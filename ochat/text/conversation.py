"""The conversation schema: who said what, under which class, with which weight.

    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Conversation.from_dict({"items": items, "condition": "GPT4"})

Every fault of a record is a DataError that names the field; nothing is guessed or cut. Other keys (`id`, `source`) are
metadata and are left out, unless one looks like a field's name misspelt.
"""

from __future__ import annotations

import difflib
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ochat.errors import DataError

ROLES = ("user", "assistant")
MISSPELT = 0.8  # difflib's ratio: `itemz`, `wieght` and `conditions` reach it, `id`, `edition` and `title` do not
LONGEST_MISSPELT = 40  # a key of megabytes is no field's name, and difflib would take minutes to say so
_KINDS: dict[type, str] = {
    type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    """One turn. `weight` None: not given, which means 1 for the assistant and 0 for the user."""

    role: str
    content: str
    weight: float | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the class they belong to ("" : none), the system text ("" : none) and an optional reward."""

    items: tuple[Message, ...]
    condition: str = ""
    system: str = ""
    reward: float | None = None

    @classmethod
    def from_dict(cls, record: Any) -> Conversation:
        """Read one record.

        `items`: a list of {"role": "user" | "assistant", "content": str, "weight": number (optional)}, not empty;
        `condition`, `system`: str (optional); `reward`: number (optional). Other keys are metadata.
        Raises: DataError, naming the field, for anything missing, mistyped or misspelt.
        """
        require_object(record, "record")
        refuse_misspelt(record, ("items", "condition", "system", "reward"), "record")
        items = require_list(record, "items")
        return cls(
            items=tuple(_message(item, f"items[{i}]") for i, item in enumerate(items)),
            condition=text_field(record, "condition", "condition"),
            system=text_field(record, "system", "system"),
            reward=number_field(record, "reward", "reward"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record that `from_dict` reads back as an equal conversation."""
        items = [{key: value for key, value in vars(m).items() if value is not None} for m in self.items]
        record = {"items": items, "condition": self.condition, "system": self.system}
        return record if self.reward is None else record | {"reward": self.reward}


def default_weight(role: str) -> float:
    """What a span of this role weighs where the record gives no weight."""
    return 1.0 if role == "assistant" else 0.0


def _message(item: Any, place: str) -> Message:
    require_object(item, place)
    refuse_misspelt(item, ("role", "content", "weight"), place)
    role = text_field(item, "role", f"{place}.role", required=True)
    if role not in ROLES:
        hint = "put it into the record's `system` field" if role == "system" else "use user or assistant"
        raise DataError(f"{place}.role: unknown role {role[:40]!r}; {hint}")
    content = text_field(item, "content", f"{place}.content", required=True)
    return Message(role, content, number_field(item, "weight", f"{place}.weight"))


def require_object(value: Any, place: str) -> None:
    """Raises: DataError unless `value` is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object, got {describe(value)}")


def require_list(record: dict[str, Any], key: str) -> list[Any]:
    """The non-empty list under `key`. Raises: DataError."""
    if key not in record:
        raise DataError(f"{key}: missing{_nearest(key, record)}; a conversation needs a list of messages there")
    value = record[key]
    if not isinstance(value, list):
        raise DataError(f"{key}: expected a list, got {describe(value)}")
    if not value:
        raise DataError(f"{key}: empty; a conversation needs at least one message")
    return value


def refuse_misspelt(record: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """Raises: DataError for a key that is no known one, but close to one."""
    for key in record:
        if key not in known and len(key) <= LONGEST_MISSPELT and (close := _misspelt(key, known)):
            raise DataError(f"{place}: unknown key {key!r}; did you mean {close!r}? If not, rename or remove it")


@lru_cache(maxsize=4096)  # the same keys come with every record, and difflib is slower than a tokenizer
def _misspelt(key: str, known: tuple[str, ...]) -> str:
    """The known key that `key` is close to, "" if there is none."""
    return next(iter(difflib.get_close_matches(key.lower(), known, n=1, cutoff=MISSPELT)), "")


def text_field(record: dict[str, Any], key: str, place: str, *, required: bool = False) -> str:
    """The text under `key` ("" when it may be missing and is). Raises: DataError."""
    if key not in record:
        if required:
            raise DataError(f"{place}: missing{_nearest(key, record)}")
        return ""
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, got {describe(value)}")
    check_unicode(value, f"{place}: ")
    return value


def check_unicode(text: str, place: str = "") -> None:
    """Raises: DataError, which begins with `place`, for a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}a lone surrogate at character {error.start}; it is no valid Unicode text") from None


def number_field(record: dict[str, Any], key: str, place: str) -> float | None:
    """The finite number under `key`, None when it is missing or null. Raises: DataError."""
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{place}: expected a number, got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise DataError(f"{place}: too large for a float") from None
    if not math.isfinite(number):
        raise DataError(f"{place}: expected a finite number, got {number}")
    return number


def describe(value: Any) -> str:
    """A short name of a JSON value for messages: its kind, and its text when that is short."""
    kind = _KINDS.get(type(value), type(value).__name__)
    if value is None or value and isinstance(value, list | dict):  # which may be nested too deep to be shown
        return kind
    shown = repr(value)
    return f"{kind} ({shown})" if len(shown) <= 40 else kind


def _nearest(key: str, record: dict[str, Any]) -> str:
    near = [k for k in itertools.islice(record, 100) if len(k) <= LONGEST_MISSPELT]
    close = difflib.get_close_matches(key, near, n=1)
    return f" (there is {close[0]!r})" if close else ""
