"""Turns of plain text, each part tokenised alone: BOS, then prefix, content and end of turn, again and again.

    segments = PlainChat(bos, eot, suffix, prefix, takes_tools).segments(conversation, tokenizer)

rendered.py is the other way to write a conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ochat.errors import DataError
from ochat.text.chat import llama_tools
from ochat.text.conversation import Conversation, Message
from ochat.text.token_weights import Characters, Segment
from ochat.text.tokenizer import Tokenizer

CONDITIONED = ("user", "assistant")  # roles whose prefixes may carry the condition
NUM_PREFIXES = 2 * len(CONDITIONED)  # each alone, and behind another turn's suffix


class PlainChat(NamedTuple):
    """How turns are written."""

    name: str  # of the template, for messages
    bos: str | None  # special token in front of all
    eot: str  # special token after every content
    suffix: str  # text after that
    prefix: Callable[[str, str], str]  # (role, condition) -> text before the content
    takes_tools: bool
    carries_condition: Callable[[str], bool]  # whether the prefix of a role does

    def segments(self, conversation: Conversation, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation in order. Raises: DataError for a conversation that plain text cannot say."""
        segments, suffix = self._turns(conversation, tokenizer)
        return [*segments, Segment("prefix", None, "", tokenizer.prefix_ids(suffix))] if suffix else segments

    def prompt_segments(self, conversation: Conversation, begun: Message, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation up to where the assistant answers, and what it has `begun` to say. Raises: DataError."""
        segments, suffix = self._turns(conversation, tokenizer)
        condition = conversation.condition if begun.condition is None else begun.condition
        prefix = tokenizer.prefix_ids(suffix + self.prefix("assistant", condition))
        return [*segments, Segment("prefix", None, "", prefix), Segment("assistant", None, begun.content)]

    def _turns(self, conversation: Conversation, tokenizer: Tokenizer) -> tuple[list[Segment], str]:
        """Segments up to the last end of turn, and the text that comes behind it."""
        conversation = self._spelt(conversation)
        eot = (tokenizer.special_tokens[self.eot],)
        segments = [] if self.bos is None else [Segment("bos", None, "", (tokenizer.special_tokens[self.bos],))]
        before = ""
        if conversation.system:
            segments.append(Segment("prefix", None, "", tokenizer.prefix_ids(self.prefix("system", ""))))
            segments.append(Segment("system", None, conversation.system, eot))
            before = self.suffix
        for message in conversation.items:
            own = message.condition
            prefix = before + self.prefix(message.role, conversation.condition if own is None else own)
            number = prefix_number(message.role, is_first=not before) if self.carries_condition(message.role) else 0
            ids = tokenizer.prefix_ids(prefix)
            segments.append(Segment("prefix", None, "", ids, condition=own, prefix=number))
            segments.append(_content(message, eot))
            before = self.suffix
        return segments, before

    def _spelt(self, conversation: Conversation) -> Conversation:
        """The conversation as plain text. Raises: DataError for what cannot be written."""
        with_tools = "tools" if conversation.tools else ""
        for i, message in enumerate(conversation.items):
            if message.reasoning:
                raise DataError(
                    f"items[{i}]: reasoning, which the template {self.name} cannot write; --reasoning drop leaves it "
                    "out, and the template qwen3 writes it"
                )
            if message.role == "tool" or message.tool_calls:
                with_tools = with_tools or f"items[{i}]: tool calls and replies"
        if not with_tools:
            return conversation
        if not self.takes_tools:
            raise DataError(
                f"{with_tools}: the template {self.name} cannot write them; use openchat_3.6, llama3.1, chatml or qwen3"
            )
        return llama_tools.spelt(conversation)


def _content(message: Message, eot: tuple[int, ...]) -> Segment:
    characters = None
    if message.spans:
        characters = Characters.of(len(message.content), message.role, message.weight, message.spans)
    return Segment(message.role, message.weight_around, message.content, eot, characters, condition=message.condition)


def prefix_number(role: str, *, is_first: bool) -> int:
    """The number of a prefix that carries the condition, from 1; `is_first`: no suffix of another turn is in it."""
    return 1 + CONDITIONED.index(role) + len(CONDITIONED) * (not is_first)
