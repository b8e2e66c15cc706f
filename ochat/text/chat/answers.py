"""Where in a rendered text the assistant answers, from its first character to the end of its turn.

    turns = in_blocks(conversation, written)                       # a template with `{% generation %}` blocks
    turns = after_prompts(conversation, written, "<|im_end|>", prompt)      # any other

An answer is more than its content: calls of tools, reasoning, the token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ochat.errors import DataError
from ochat.text.chat.marks import GENERATED, Stretch, Written
from ochat.text.chat.variables import SAID
from ochat.text.conversation import Conversation, Message

Turns = dict[int, list[Stretch]]  # message number -> its stretches of the text


def in_blocks(conversation: Conversation, written: Written) -> Turns:
    """What generation blocks hold, by message: one each, or some each, and those with no message's text (but the end of
    a turn, say) belong to the message before. Raises: DataError."""
    blocks = written.places.get(GENERATED, [])
    turns: Turns = {i: [] for i, message in enumerate(conversation.items) if message.role == "assistant"}
    said = [(stretch, i) for (kind, i), stretches in written.places.items() if kind in SAID for stretch in stretches]
    one_each = iter(turns) if len(blocks) == len(turns) else None
    at = next(iter(turns), 0)
    for start, end in blocks:
        inside = {i for (first, last), i in said if start <= first and last <= end}
        at = next(one_each) if one_each else min(inside, default=at)
        if at not in turns or not inside <= {at}:
            raise DataError("the chat template writes other messages into an answer of the assistant")
        turns[at].append((start, end))
    spoken = {i for _, i in said}
    for i in turns:
        if not turns[i] or (one_each is None and i not in spoken):
            raise DataError(f"items[{i}]: the chat template has no generation block around this message")
    return turns


def after_prompts(
    conversation: Conversation, written: Written, eot: str, prompt: Callable[[Conversation], Written]
) -> Turns:
    """From where the prompt for each answer ends up to its end of turn, by message. Raises: DataError."""
    others = [
        stretch
        for i, message in enumerate(conversation.items)
        if message.role != "assistant"
        for stretch in written.places.get(("content", i), [])
    ]
    turns: Turns = {}
    for i, message in enumerate(conversation.items):
        if message.role != "assistant":
            continue
        start = _start(conversation, i, written, eot, prompt)
        last = max([start, *(end for kind in SAID for _, end in written.places.get((kind, i), []))])
        end = written.text.find(eot, last) + len(eot)
        if end < last + len(eot):
            raise DataError(f"items[{i}]: the chat template writes no {eot!r} after this message")
        if any(start < other_end and other_start < end for other_start, other_end in others):
            raise DataError(f"items[{i}]: the chat template writes other messages into this answer")
        turns[i] = [(start, end)]
    return turns


def _start(
    conversation: Conversation, i: int, written: Written, eot: str, prompt: Callable[[Conversation], Written]
) -> int:
    """Where message i begins in the text: behind what the prompt for it ends with.

    The prompt as a whole need not be in the text: with more messages, templates write the earlier ones otherwise
    (without their reasoning, say). So the two are followed from the last place that both have: the end of what some
    message says.
    """
    try:
        asked = prompt(replace(conversation, items=conversation.items[:i]))
    except DataError as error:
        if i == 0 and (start := _start_of_first(conversation, written, eot, prompt)) is not None:
            return start
        raise DataError(f"items[{i}]: the chat template has no prompt for this message: {error}") from None
    shared = [(stretches[-1][1], label) for label, stretches in asked.places.items() if label in written.places]
    place, label = max(shared, default=(0, None))
    since = written.places[label][-1][1] if label else 0
    opening = asked.text[place:]
    if not written.text.startswith(opening, since):  # a prompt may begin reasoning that this answer does not have
        opening = opening.partition("<think")[0]
    if not written.text.startswith(opening, since):
        raise DataError(f"items[{i}]: the chat template does not write this message where it would be answered")
    return since + len(opening)


def _start_of_first(
    conversation: Conversation, written: Written, eot: str, prompt: Callable[[Conversation], Written]
) -> int | None:
    """Where the answer begins that nothing precedes, for templates that refuse to prompt for it: behind what they open
    an answer to a question with. None where that is not in the text."""
    asked = prompt(replace(conversation, items=(Message("user", "x"),)))
    opening = asked.text.rpartition(eot)[2].lstrip()
    said = [start for kind in SAID for start, _ in written.places.get((kind, 0), [])]
    place = written.text.rfind(opening, 0, min(said, default=0))
    return None if place < 0 or not opening else place + len(opening)
