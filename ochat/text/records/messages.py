"""Read the messages of a record: roles, content, weights, reasoning and tool calls, by whatever keys they have.

    turns = MessageReader().turns(record["messages"], "messages", "user", notes)

keys.py lists the keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ochat.errors import DataError
from ochat.text.attributes import AttributeFormat
from ochat.text.conversation import Message
from ochat.text.fields import as_rows, check_object, check_text, describe, shorten
from ochat.text.records.calls import read_calls
from ochat.text.records.content import Content, in_order, read_parts, read_spans
from ochat.text.records.keys import MESSAGE
from ochat.text.records.objects import Fields, Notes, read_fields

_NAMES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai", "chatbot"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of calls


class Turn(NamedTuple):
    """A message, of which the role may also be system, and where the record has it."""

    place: str
    message: Message
    is_prompt: bool = False  # an answer in it is not trained, unless it has a weight


def as_prompt(turns: list[Turn]) -> list[Turn]:
    """The turns, of which nothing is trained that has no weight."""
    return [turn._replace(is_prompt=True) for turn in turns]


@dataclass(frozen=True)
class MessageReader:
    """How messages are read. `columns`: more of their keys, and what they mean; `roles`: more names of roles;
    `attributes`: how a condition of several is written."""

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    attributes: AttributeFormat = AttributeFormat()

    def turns(self, value: Any, place: str, role: str, notes: Notes) -> list[Turn]:
        """The messages of a list, one message, or text that `role` says. Raises: DataError naming the field."""
        if isinstance(value, str):
            return [Turn(place, Message(role, check_text(value, place)))]
        value = as_rows(value, place)
        if isinstance(value, dict):
            return [self._turn(value, place, notes)]
        if not isinstance(value, list):
            raise DataError(f"{place}: expected text or messages, got {describe(value)}")
        return [self._turn(item, f"{place}[{i}]", notes) for i, item in enumerate(value)]

    def _turn(self, value: Any, place: str, notes: Notes) -> Turn:
        check_object(value, place)
        try:
            return Turn(place, self._message(read_fields(value, MESSAGE, notes, self.columns)))
        except DataError as error:
            raise DataError(f"{place}.{error}") from None

    def _message(self, fields: Fields) -> Message:
        role, is_call = self._role(fields)
        content = fields.values.get("content")
        is_plain = len(fields.values) == 2 + ("weight" in fields.values)
        if is_plain and isinstance(content, str) and not is_call:  # most messages, without delay
            return Message(role, check_text(content, fields.names["content"]), fields.weight())
        content = _content(fields)
        calls = _calls(fields)
        if is_call:
            try:
                calls = read_calls(content.text, fields.name("content"), fields.notes) + calls
            except DataError as error:
                name = shorten(fields.text("role"))
                raise DataError(f'{error}; if it is text, --map with roles = {{{name} = "assistant"}}') from None
            content = content._replace(text="")
        elif "content" not in fields and not calls and not content.reasoning.strip():
            fields.text("content", required=True)
        if role != "assistant":
            _check_said(fields, content, calls)
            content = content._replace(reasoning="")  # of blanks
        for meaning in ("tool", "tool_call_id"):
            if meaning in fields and role != "tool":
                fields.leave_out(meaning)
        fields.check_label()
        spans = [*content.spans, *read_spans(fields, len(content.text))]
        return Message(
            role,
            content.text,
            fields.weight(),
            in_order(spans),
            content.reasoning,
            tuple(calls),
            fields.text("tool") if role == "tool" else "",
            fields.text("tool_call_id") if role == "tool" else "",
            self._condition(fields, role),
        )

    def _condition(self, fields: Fields, role: str) -> str | None:
        """The message's own class, None if it has none. Raises: DataError for a role whose prefix carries none."""
        condition = fields.condition(self.attributes)
        if condition and role not in ("user", "assistant"):
            raise fields.refusal("condition", f"no prefix of the role {role} carries a class")
        return condition

    def _role(self, fields: Fields) -> tuple[str, bool]:
        """The role, and whether the content is a call."""
        said = fields.values.get("role")
        if type(said) is str and said in ROLES and not self.roles:  # nearly always, without delay
            return ROLES[said], False
        if "role" not in fields:
            keys = "--map names the keys of messages (role, content) or of pairs (question, answer)"
            raise DataError(f"{fields.name('role')}: missing or null; {keys}{fields.others()}")
        said = fields.text("role")
        name = self.roles.get(said, said).strip().lower()
        role = ROLES.get(name)
        if role is None and name not in CALLS:
            known, new = ", ".join((*ROLES, *CALLS)), f'with --map: roles = {{{json.dumps(shorten(said))} = "user"}}'
            raise DataError(f"{fields.name('role')}: unknown role {shorten(said)!r}; known: {known}; others {new}")
        return role or "assistant", role is None


def _content(fields: Fields) -> Content:
    name = fields.name("content")
    value = as_rows(fields.values.get("content", ""), name)
    content = read_parts(value, name, fields.notes) if isinstance(value, list) else Content(check_text(value, name))
    reasoning = "\n".join(filter(None, (fields.reasoning(), content.reasoning)))
    return content._replace(reasoning=reasoning)


def _calls(fields: Fields) -> list[dict[str, Any]]:
    return [
        call
        for meaning in ("tool_calls", "function_call")
        if meaning in fields
        for call in read_calls(fields.values[meaning], fields.names[meaning], fields.notes)
    ]


def _check_said(fields: Fields, content: Content, calls: list[dict[str, Any]]) -> None:
    """Raises: DataError for what only the assistant says."""
    if calls:
        meaning = "tool_calls" if "tool_calls" in fields else "function_call"
        raise fields.refusal(meaning, "only the assistant calls tools")
    if content.reasoning.strip():
        meaning = "reasoning" if "reasoning" in fields else "content"
        raise fields.refusal(meaning, "only the assistant's messages have reasoning")
