"""Read the system text of a record: its own, or that of the first message.

system, items = split_system(turns, fields)
"""

from __future__ import annotations

from ochat.errors import DataError
from ochat.text.conversation import Message
from ochat.text.fields import check_text
from ochat.text.records.content import read_parts
from ochat.text.records.messages import Turn
from ochat.text.records.objects import Fields


def read_system(fields: Fields) -> str:
    """The system text of a record, "" if it has none; content parts are joined. Raises: DataError."""
    value = fields.values.get("system")
    if not isinstance(value, list):
        return fields.text("system")
    name = fields.names["system"]
    content = read_parts(value, name, fields.notes)
    if content.reasoning or content.spans:
        raise DataError(f"{name}: the system text has neither reasoning nor weights; remove them")
    return check_text(content.text, name)


def split_system(turns: list[Turn], fields: Fields) -> tuple[str, tuple[Message, ...]]:
    """The system text, of the first message or of the record, and the other messages. Raises: DataError."""
    system = read_system(fields) if "system" in fields else ""
    first, *others = turns
    if first.message.role == "system":
        if first.message.weight or first.message.spans:
            raise DataError(f"{first.place}: the system text is never trained on; remove its weight")
        if system and first.message.content and system != first.message.content:
            raise fields.refusal("system", f"{first.place} has another system text; keep one of the two")
        system = system or first.message.content
        turns = others
    for turn in turns:
        if turn.message.role == "system":
            raise DataError(f"{turn.place}: a system message after the first message cannot be expressed")
    if not turns:
        raise DataError(f"{first.place}: only a system message; a conversation needs a user or assistant message")
    return system, tuple(turn.message for turn in turns)
