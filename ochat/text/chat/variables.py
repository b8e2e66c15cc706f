"""What a server passes to a chat template: `messages`, `tools` if any, and `condition`, the class.

variables = chat_variables(conversation);  template.render(**variables)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ochat.errors import DataError
from ochat.text.chat.marks import Label, mark
from ochat.text.conversation import Conversation, Message

SYSTEM: Label = ("system", 0)
SAID = ("content", "reasoning", "tool call")  # kinds of labels whose number is a message's


def chat_variables(conversation: Conversation, labels: list[Label] | None = None) -> dict[str, Any]:
    """The variables, with the system text as the first message.

    With `labels`, what comes from the record is marked (marks.py), and `labels` gets the labels. Raises: DataError for
    a tool without a name, and for text that cannot be marked.
    """

    def marked(text: str, label: Label) -> str:
        return text if labels is None else mark(text, label, labels)

    messages: list[dict[str, Any]] = []
    if conversation.system:
        messages.append({"role": "system", "content": marked(conversation.system, SYSTEM)})
    messages += [_message(message, i, marked) for i, message in enumerate(conversation.items)]
    tools = [_tool(tool, i, marked) for i, tool in enumerate(conversation.tools)]
    return {"messages": messages, "condition": conversation.condition} | ({"tools": tools} if tools else {})


def _message(message: Message, number: int, marked: Callable[[str, Label], str]) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": marked(message.content, ("content", number))}
    if message.reasoning:
        reasoning = marked(message.reasoning, ("reasoning", number))
        found |= {"thinking": reasoning, "reasoning_content": reasoning}  # both names that templates read
    if message.tool_calls:
        found["tool_calls"] = [_call(call, marked(call["name"], ("tool call", number))) for call in message.tool_calls]
    names = {"name": message.name, "tool_call_id": message.tool_call_id}
    return found | {key: value for key, value in names.items() if value}


def _call(call: dict[str, Any], name: str) -> dict[str, Any]:
    identity = {"id": call["id"]} if "id" in call else {}
    return identity | {"type": "function", "function": {"name": name, "arguments": call["arguments"]}}


def function_of(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool; a bare function is wrapped as servers' users write it. Raises: DataError for one without a name."""
    tool = tool if "function" in tool or "type" in tool else {"type": "function", "function": tool}
    function = tool.get("function")
    if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise DataError("tools: each needs a function with a name")
    return tool


def _tool(tool: dict[str, Any], number: int, marked: Callable[[str, Label], str]) -> dict[str, Any]:
    tool = function_of(tool)
    return tool | {"function": tool["function"] | {"name": marked(tool["function"]["name"], ("tool", number))}}
