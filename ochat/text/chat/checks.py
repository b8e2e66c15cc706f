"""What a chat template must not do to a conversation: leave out, change, or mix up what is said.

Each check raises DataError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from ochat.errors import DataError
from ochat.text.chat.marks import Written
from ochat.text.conversation import Conversation

_NAMES = {
    "system": "the system text",
    "content": "the content of items[{}]",
    "tool call": "tool calls of items[{}]",
    "tool": "tools",
}


def check_complete(conversation: Conversation, written: Written) -> None:
    """The system text, all messages, calls and tools are in the text."""
    for kind, number in written.lost:
        if kind in _NAMES:
            what = _NAMES[kind].format(number)
            hint = "choose another --template, or leave the record out"
            if kind == "content" and "</think>" in conversation.items[number].content:
                hint = f"it takes <think> out of the text; write the thoughts into reasoning_content, or {hint}"
            raise DataError(f"the chat template leaves out {what}; {hint}")


def check_faithful(conversation: Conversation, written: Written, plain: str) -> None:
    """Marks change nothing (`plain` is without), and contents come once each and in order."""
    text, contents = written.text, [written.places.get(("content", i), []) for i in range(len(conversation.items))]
    flat = [place for stretches in contents for stretch in stretches for place in stretch]
    if text != plain or any(len(stretches) > 1 for stretches in contents) or flat != sorted(flat):
        raise DataError("the chat template changes what messages say, so that they cannot be found in its text")
    condition = conversation.condition
    for i, message in enumerate(conversation.items):  # a template that finds roles in its own text may find them there
        for start, end in contents[i] if condition else []:
            if text.count(condition, start, end) > message.content.count(condition):
                raise DataError(f"items[{i}]: the chat template writes the class into this message: it spells a role")


def check_special_tokens(conversation: Conversation, special_tokens: Iterable[str]) -> None:
    """No special token is spelt where it cannot be told from the template's own."""
    unmarked = [[message.tool_calls, message.name, message.tool_call_id] for message in conversation.items]
    if conversation.tools or any(any(each) for each in unmarked):
        text = json.dumps([unmarked, conversation.tools], ensure_ascii=False)
        for token in special_tokens:
            if token in text:
                raise DataError(f"tools: they spell the special token {token!r}; rename it")


def check_reasoning(lost: Sequence[int], *, never_written: bool, needs_all: bool) -> None:
    """`lost`: the messages whose reasoning is left out. Templates may, of earlier answers, unless `needs_all`."""
    if lost and never_written:
        raise DataError("the chat template leaves out reasoning; --reasoning drop leaves it out knowingly")
    if lost and needs_all:
        raise DataError(
            f"items[{lost[0]}]: the chat template leaves out the reasoning of this message; use --reasoning template, "
            "or last"
        )
