"""Find in the text that a chat template (Jinja) writes who says what, and how much each character weighs.

    chat = RenderedChat(source, eot="<|im_end|>", date="2025-01-01", variables={})
    segments = chat.segments(conversation, tokenizer)

A template is a program, so nothing is assumed of it: the conversation is rendered twice, as a server would and with
invisible marks around what comes from the record (marks.py). Without its marks the second text must be the first, so
nothing is lost or moved unseen; where the marks are, there is the record's text.

An answer is what a `{% generation %}` block holds. Where the template has none, it begins where the prompt for it would
end, which is a third rendering (of the messages before, with add_generation_prompt), and it ends with the end-of-turn
token (answers.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from ochat.errors import DataError
from ochat.text.chat import answers, checks, dates, marks
from ochat.text.chat.answers import Turns
from ochat.text.chat.marks import GENERATED, Label, Stretch, Written
from ochat.text.chat.variables import SYSTEM, chat_variables
from ochat.text.conversation import Conversation, Message
from ochat.text.token_weights import ROLE_IDS, ROLES, Characters, Segment
from ochat.text.tokenizer import Tokenizer

THOUGHT = re.compile(r"\s*<think>(.*?)</think>\n*(.*)", re.DOTALL)


@dataclass(frozen=True)
class LaidOut:
    """A rendered conversation, and whose each of its characters is."""

    text: str
    characters: Characters
    from_record: list[Stretch]  # text of the record, in which special tokens are ordinary text


class RenderedChat:
    """A chat template by its source. `eot` ends the assistant's turns; `date` is what strftime_now tells.

    Raises: ConfigError for a source that is no template.
    """

    def __init__(self, source: str, eot: str, date: str, variables: Mapping[str, str]) -> None:
        from ochat.text.chat.sandbox import ChatSource  # jinja2 takes memory, and most templates need none

        self.source, self.eot, self.date, self.variables = source, eot, date, variables
        self._chat = ChatSource(source, dates.parse_date(date))
        self.has_generation = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    def render(self, conversation: Conversation, **variables: Any) -> str:
        """The text that a server renders. Raises: DataError with the template's own words."""
        return self._chat.render(**self.variables, **chat_variables(conversation), **variables)

    def marked(self, conversation: Conversation, **variables: Any) -> Written:
        """The text, and where in it the parts of the record are. Raises: DataError as `render`."""
        labels: list[Label] = []
        passed = chat_variables(conversation, labels)
        return marks.take(self._chat.render(marked=True, **self.variables, **passed, **variables), labels)

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the reasoning of a last answer is in the text."""
        asked = (Message("user", "Why?"), Message("assistant", "So.", reasoning="Because."))
        return not self.lost_reasoning(Conversation(asked))

    def lost_reasoning(self, conversation: Conversation) -> list[int]:
        """The messages whose reasoning is not in the text."""
        return self.marked(conversation).lost_of("reasoning")

    def with_thoughts_apart(self, conversation: Conversation) -> Conversation:
        """The conversation with `<think>` blocks in front of answers as their reasoning, where the text is the same."""
        items = tuple(map(_with_thought_apart, conversation.items))
        if items == conversation.items or not self.writes_reasoning:
            return conversation
        apart = replace(conversation, items=items)
        return apart if self.render(conversation) == self.render(apart) else conversation

    def default_system(self, tokenizer: Tokenizer) -> str:
        """What is written where a conversation has no system text, with its headers; "" where nothing is.

        Raises: DataError where the template refuses a plain question.
        """
        asked = "Why?"
        before, _, _ = self.render(Conversation((Message("user", asked),))).partition(asked)
        parts = tokenizer.split_at_specials(before)  # text, special token, text, ...: the last turn is the question's
        ends = [i for i in range(1, len(parts), 2) if parts[i] == self.eot]
        return "".join(parts[: ends[-1]]).strip() if ends else ""

    def served_source(self, default_condition: str) -> str:
        """The source for servers, which writes the same whatever day it is and knows the variables."""
        default = json.dumps(default_condition, ensure_ascii=False)
        lines = [f"set condition = condition if condition is defined and condition is not none else {default}"]
        lines += [f"set {name} = {json.dumps(text, ensure_ascii=False)}" for name, text in self.variables.items()]
        dated = dates.fixed(self.source, self.date)
        return "".join(f"{{%- {line} %}}" for line in lines) + dated + "\n" + self.source

    def segments(
        self, conversation: Conversation, tokenizer: Tokenizer, *, needs_reasoning: bool = False
    ) -> list[Segment]:
        """The conversation as segments: one, if no message spells a special token, else one for each that is special.

        Raises: DataError for a conversation that the template cannot write; with `needs_reasoning` also if it leaves
        out any reasoning.
        """
        return _split(self.lay_out(conversation, tokenizer.special_tokens, needs_reasoning=needs_reasoning), tokenizer)

    def prompt_segments(self, conversation: Conversation, begun: Message, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation up to where the assistant answers, and what it has `begun` to say, as segments without
        roles. Raises: DataError."""
        text, from_record = self.lay_out_prompt(conversation)
        whole = text + begun.content
        from_record = [*from_record, (len(text), len(whole))]
        return _split(LaidOut(whole, Characters.of(len(whole), "prefix", None), from_record), tokenizer)

    def lay_out(
        self, conversation: Conversation, special_tokens: Iterable[str], *, needs_reasoning: bool = False
    ) -> LaidOut:
        """Text, roles and weights. `needs_reasoning`: of every answer, else of the last ones.

        Raises: DataError for a conversation that the template cannot write.
        """
        written = self.marked(conversation)
        checks.check_complete(conversation, written)
        checks.check_faithful(conversation, written, self.render(conversation))
        checks.check_special_tokens(conversation, special_tokens)
        lost = written.lost_of("reasoning")
        checks.check_reasoning(lost, never_written=bool(lost) and not self.writes_reasoning, needs_all=needs_reasoning)
        if self.has_generation:
            turns = answers.in_blocks(conversation, written)
        else:
            prompt = partial(self.marked, add_generation_prompt=True)
            turns = answers.after_prompts(conversation, written, self.eot, prompt)
        for i, message in enumerate(conversation.items):
            if message.role != "assistant":
                places = written.places.get(("content", i), [])
                turns[i] = [(start, self._end_of_turn(message, written.text, end)) for start, end in places]
        return LaidOut(written.text, _characters(conversation, written, turns), _from_record(written))

    def lay_out_prompt(self, conversation: Conversation) -> tuple[str, list[Stretch]]:
        """The text up to where the assistant answers, and where in it the record's text is. Raises: DataError."""
        written = self.marked(conversation, add_generation_prompt=True)
        checks.check_faithful(conversation, written, self.render(conversation, add_generation_prompt=True))
        return written.text, _from_record(written)

    def _end_of_turn(self, message: Message, text: str, end: int) -> int:
        """Behind the end-of-turn token, where it follows what the message says up to `end`; else `end`."""
        blanks = message.content[len(message.content.rstrip()) :]  # of which a template may write none
        endings = (ending for ending in (blanks + self.eot, self.eot) if text.startswith(ending, end))
        return end + len(next(endings, ""))


def _with_thought_apart(message: Message) -> Message:
    found = THOUGHT.fullmatch(message.content) if message.role == "assistant" else None
    if not found or message.reasoning or message.spans or "</think>" in found[2]:
        return message
    return replace(message, reasoning=found[1].strip("\n"), content=found[2])


@lru_cache(maxsize=8)
def compiled(source: str, eot: str, date: str, variables: tuple[tuple[str, str], ...]) -> RenderedChat:
    """The chat template, compiled once. Raises: ConfigError for a syntax error or a wrong date."""
    return RenderedChat(source, eot, date, dict(variables))


def _split(laid_out: LaidOut, tokenizer: Tokenizer) -> list[Segment]:
    """Segments of a text in which special tokens are special but where they lie within the record's text."""
    text, characters = laid_out.text, laid_out.characters
    matches = list(tokenizer.find_specials(text))
    live = [m for m in matches if not any(a <= m.start() and m.end() <= b for a, b in laid_out.from_record)]
    if len(live) == len(matches):
        return [Segment("prefix", None, text, (), characters, is_live=True)]
    found, at = [], 0
    for match in live:
        role, weight = ROLES[characters.roles[match.start()]], float(characters.weights[match.start()])
        part, token = slice(at, match.start()), (tokenizer.special_tokens[match[0]],)
        found.append(Segment(role, None if math.isnan(weight) else weight, text[part], token, characters[part]))
        at = match.end()
    return [*found, Segment("prefix", None, text[at:], (), characters[at:])]


def _characters(conversation: Conversation, written: Written, turns: Turns) -> Characters:
    """Role and weight of each character; what no message says is the template's own, of weight 0."""
    text = written.text
    roles, weights = np.full(len(text), ROLE_IDS["prefix"], np.uint8), np.full(len(text), np.nan, np.float32)
    for start, end in written.places.get(SYSTEM, []):
        roles[start:end] = ROLE_IDS["system"]
    for i, message in enumerate(conversation.items):
        for start, end in turns[i]:
            roles[start:end] = ROLE_IDS[message.role]
            if message.weight_around is not None:
                weights[start:end] = message.weight_around
        if message.spans:
            first = len(message.content) - len(message.content.lstrip())  # blanks in front may be trimmed
            for start, end in written.places.get(("content", i), []):
                if text[start:end] != message.content.strip():
                    raise DataError(f"items[{i}]: the chat template rewrites this message, so spans cannot weigh it")
                for span in message.spans:
                    weights[start + max(span.start - first, 0) : min(start + span.end - first, end)] = span.weight
    return Characters(roles, weights)


def _from_record(written: Written) -> list[Stretch]:
    return sorted(place for label, places in written.places.items() if label != GENERATED for place in places)
