"""Tools as Llama 3.1 writes them, for templates of plain text whose `roles` have a `tool`.

    spelt(conversation).items        # tools, calls and replies are in the contents

What chat_template.jinja writes for a server is the same.
"""

from __future__ import annotations

import json
from dataclasses import replace

from ochat.errors import DataError
from ochat.text.chat.variables import function_of
from ochat.text.conversation import Conversation, Message, WeightedSpan

FUNCTIONS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    "name and its value}.Do not use variables.\n\n"
)


def spelt(conversation: Conversation) -> Conversation:
    """The conversation with its tools, calls and replies in the contents of its messages.

    The tools are in front of what the user says first, and weigh 0. Raises: DataError for what Llama 3.1 cannot write.
    """
    items = [_spelt(message, f"items[{i}]") for i, message in enumerate(conversation.items)]
    if conversation.tools:
        if not items or items[0].role != "user":
            raise DataError("tools: they are written into the first message, which must be the user's")
        described = [json.dumps(function_of(tool), ensure_ascii=False, indent=4) for tool in conversation.tools]
        items[0] = _after(FUNCTIONS + "".join(f"{each}\n\n" for each in described), items[0])
    return replace(conversation, items=tuple(items), tools=())


def _spelt(message: Message, place: str) -> Message:
    if message.tool_calls:
        if message.content.strip():
            raise DataError(f"{place}.content: text beside a tool call, which the template cannot write; use chatml")
        call, *others = message.tool_calls
        if others:
            raise DataError(f"{place}.tool_calls: the template writes one call in a message; use chatml, or qwen3")
        written = {"name": call["name"], "parameters": call["arguments"]}
        return replace(message, content=json.dumps(written, ensure_ascii=False), spans=(), tool_calls=())
    if message.role == "tool":
        spans = [WeightedSpan(_place(message, s.start), _place(message, s.end), s.weight) for s in message.spans]
        return replace(message, content=json.dumps(message.content, ensure_ascii=False), spans=tuple(spans))
    return message


def _place(message: Message, at: int) -> int:
    """Where character `at` of the content is in its JSON."""
    return len(json.dumps(message.content[:at], ensure_ascii=False)) - 1


def _after(text: str, message: Message) -> Message:
    """The message with the text in front, which weighs 0."""
    spans = [WeightedSpan(s.start + len(text), s.end + len(text), s.weight) for s in message.spans]
    return replace(message, content=text + message.content, spans=(WeightedSpan(0, len(text), 0.0), *spans))
