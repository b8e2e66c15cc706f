"""A conversation: who said what, under which class, with which weight.

    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    Conversation.from_dict({"items": items, "condition": "GPT4"})

record_formats.py reads records of all formats as conversations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class WeightedSpan(NamedTuple):
    """Characters `start` up to `end` of a message's content (code points), and the weight that they have instead of the
    message's."""

    start: int
    end: int
    weight: float


@dataclass(frozen=True)
class Message:
    """One turn. `weight` None: not given, which means 1 for the assistant and 0 for the others."""

    role: str  # user, assistant or tool
    content: str
    weight: float | None = None
    spans: tuple[WeightedSpan, ...] = ()  # in order, without overlap
    reasoning: str = ""  # what the assistant thinks before the content
    tool_calls: tuple[dict[str, Any], ...] = ()  # {"name", "arguments"}, and "id" if there is one
    name: str = ""  # of the tool that replies
    tool_call_id: str = ""  # of the call that it replies to
    condition: str | None = None  # its class; None: the conversation's

    @property
    def weight_around(self) -> float | None:
        """Of what is written around the content, such as the end of turn: 0 where spans give 0 to all that is said."""
        zeros = sum(span.end - span.start for span in self.spans if span.weight == 0)
        is_untrained = self.spans and zeros == len(self.content) and not (self.reasoning or self.tool_calls)
        return 0.0 if is_untrained else self.weight

    def to_dict(self) -> dict[str, Any]:
        """The message as a record holds it, without what it does not have."""
        record: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.weight is not None:
            record["weight"] = self.weight
        optional = {
            "spans": [list(span) for span in self.spans],
            "reasoning_content": self.reasoning,
            "tool_calls": list(self.tool_calls),
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        record |= {key: value for key, value in optional.items() if value}
        return record if self.condition is None else record | {"condition": self.condition}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, the class they belong to ("" : none), the system text ("" : none) and an optional reward."""

    items: tuple[Message, ...]
    condition: str = ""
    system: str = ""
    reward: float | None = None
    tools: tuple[dict[str, Any], ...] = field(default=())  # as the record describes them

    @classmethod
    def from_dict(cls, record: Any) -> Conversation:
        """Read one record of any format, most simply
        {"items": [{"role", "content", "weight"}], "condition", "system", "reward"}.

        Raises: DataError, naming the field, for anything missing, mistyped, misspelt or not understood.
        """
        from ochat.text import record_formats  # which makes conversations

        return record_formats.convert(record)

    @property
    def conditions(self) -> dict[str, str]:
        """The classes that it names, each by its field."""
        of_turns = {f"items[{i}].condition": m.condition for i, m in enumerate(self.items) if m.condition is not None}
        return {"condition": self.condition} | of_turns

    def to_dict(self) -> dict[str, Any]:
        """The record that `from_dict` reads back as an equal conversation."""
        record = {"items": [m.to_dict() for m in self.items], "condition": self.condition, "system": self.system}
        if self.reward is not None:
            record["reward"] = self.reward
        return record | ({"tools": list(self.tools)} if self.tools else {})


def default_weight(role: str) -> float:
    """What a span of this role weighs where the record gives no weight."""
    return 1.0 if role == "assistant" else 0.0
