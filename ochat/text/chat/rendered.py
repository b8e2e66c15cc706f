"""Find in the text that a chat template (Jinja) writes who says what, and how much each character weighs.

    chat = RenderedChat(source, eot="<|im_end|>", date=date, variables={})
    laid_out = chat.lay_out(conversation, special_tokens);  laid_out.text, laid_out.characters.weights

A template is a program, so nothing is assumed of it: the conversation is rendered twice, as a server would and with
invisible marks around what comes from the record (marks.py). Without its marks the second text must be the first, so
nothing is lost or moved unseen; where the marks are, there is the record's text.

An answer is more than its content: calls of tools, reasoning, the token that ends the turn. It is what a
`{% generation %}` block holds. Where the template has none, it begins where the prompt for it would end, which is a
third rendering (of the messages before, with add_generation_prompt), and it ends with the end-of-turn token.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from ochat.errors import DataError
from ochat.text.chat import marks
from ochat.text.chat.dates import parse_date
from ochat.text.chat.marks import GENERATED, Label, Marks, Stretch
from ochat.text.chat.variables import SAID, SYSTEM, chat_variables
from ochat.text.conversation import Conversation, Message
from ochat.text.token_weights import ROLE_IDS, ROLES, Characters, Segment
from ochat.text.tokenizer import Tokenizer

Turns = dict[int, list[Stretch]]  # message number -> its stretches of the text


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

    def __init__(self, source: str, eot: str, date: datetime, variables: Mapping[str, str]) -> None:
        from ochat.text.chat.sandbox import ChatSource  # jinja2 takes memory, and most templates need none

        self.eot, self.variables = eot, variables
        self._chat = ChatSource(source, date)
        self.has_generation = re.search(r"\{%[-+]?\s*generation\b", source) is not None

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the reasoning of a last answer is in the text."""
        asked = (Message("user", "Why?"), Message("assistant", "So.", reasoning="Because."))
        return ("reasoning", 1) in self._marked(Conversation(asked))[1]

    def lost_reasoning(self, conversation: Conversation) -> set[int]:
        """The messages whose reasoning is not in the text; none where no reasoning ever is, which lay_out refuses."""
        thought = {i for i, message in enumerate(conversation.items) if message.reasoning.strip()}
        if not (thought and self.writes_reasoning):
            return set()
        found = self._marked(conversation)[1]
        return {i for i in thought if ("reasoning", i) not in found}

    def render(self, conversation: Conversation, **variables: Any) -> str:
        """The text that a server renders. Raises: DataError with the template's own words."""
        return self._chat.render(**self.variables, **chat_variables(conversation), **variables)

    def lay_out(
        self, conversation: Conversation, special_tokens: Iterable[str], *, needs_reasoning: bool = False
    ) -> LaidOut:
        """Text, roles and weights. `needs_reasoning`: of every answer, else of the last ones.

        Raises: DataError for a conversation that the template cannot write.
        """
        text, found = self._marked(conversation)
        _check_complete(conversation, found)
        _check_faithful(conversation, found, text, self.render(conversation))
        _check_special_tokens(conversation, special_tokens)
        self._check_reasoning(conversation, found, needs_reasoning)
        answers = self._answers_in_blocks if self.has_generation else self._answers_after_prompts
        turns = answers(conversation, text, found)
        for i, message in enumerate(conversation.items):
            if message.role != "assistant":
                turns[i] = [(at, self._end_of_turn(message, text, end)) for at, end in found.get(("content", i), [])]
        return LaidOut(text, _characters(conversation, text, found, turns), _from_record(found))

    def lay_out_prompt(self, conversation: Conversation) -> tuple[str, list[Stretch]]:
        """The text up to where the assistant answers, and where in it the record's text is. Raises: DataError."""
        text, found = self._marked(conversation, add_generation_prompt=True)
        _check_faithful(conversation, found, text, self.render(conversation, add_generation_prompt=True))
        return text, _from_record(found)

    def _marked(self, conversation: Conversation, **variables: Any) -> tuple[str, Marks]:
        """The rendered text, and where in it the parts of the record are."""
        labels: list[Label] = []
        passed = chat_variables(conversation, labels)
        return marks.take(self._chat.render(marked=True, **self.variables, **passed, **variables), labels)

    def _end_of_turn(self, message: Message, text: str, end: int) -> int:
        """Behind the end-of-turn token, where it follows what the message says up to `end`; else `end`."""
        blanks = message.content[len(message.content.rstrip()) :]  # of which a template may write none
        endings = (ending for ending in (blanks + self.eot, self.eot) if text.startswith(ending, end))
        return end + len(next(endings, ""))

    def _check_reasoning(self, conversation: Conversation, found: Marks, needs_all: bool) -> None:
        thought = [i for i, message in enumerate(conversation.items) if message.reasoning.strip()]
        if thought and not self.writes_reasoning:
            raise DataError("the chat template leaves out reasoning; --reasoning drop leaves it out knowingly")
        if needs_all and (lost := [i for i in thought if ("reasoning", i) not in found]):
            raise DataError(
                f"items[{lost[0]}]: the chat template leaves out the reasoning of this message; use --reasoning "
                "template, or last"
            )

    def _answers_in_blocks(self, conversation: Conversation, text: str, found: Marks) -> Turns:
        """What generation blocks hold, by message: one each, or some each, and those with no message's text (but the
        end of a turn, say) belong to the message before."""
        blocks = found.get(GENERATED, [])
        turns: Turns = {i: [] for i, message in enumerate(conversation.items) if message.role == "assistant"}
        said = {stretch: i for (kind, i), stretches in found.items() if kind in SAID for stretch in stretches}
        one_each = iter(turns) if len(blocks) == len(turns) else None
        at = next(iter(turns), 0)
        for start, end in blocks:
            inside = {i for (first, last), i in said.items() if start <= first and last <= end}
            at = next(one_each) if one_each else min(inside, default=at)
            if at not in turns or not inside <= {at}:
                raise DataError("the chat template writes other messages into an answer of the assistant")
            turns[at].append((start, end))
        for i in turns:
            if not turns[i] or (one_each is None and i not in said.values()):
                raise DataError(f"items[{i}]: the chat template has no generation block around this message")
        return turns

    def _answers_after_prompts(self, conversation: Conversation, text: str, found: Marks) -> Turns:
        """From where the prompt for each answer ends up to its end of turn, by message."""
        others = [
            stretch
            for (kind, i), stretches in found.items()
            if kind == "content" and conversation.items[i].role != "assistant"
            for stretch in stretches
        ]
        turns: Turns = {}
        for i, message in enumerate(conversation.items):
            if message.role != "assistant":
                continue
            start = self._start_of_answer(conversation, i, text, found)
            last = max([start, *(end for kind in SAID for _, end in found.get((kind, i), []))])
            end = text.find(self.eot, last) + len(self.eot)
            if end < last + len(self.eot):
                raise DataError(f"items[{i}]: the chat template writes no {self.eot!r} after this message")
            if any(start < other_end and other_start < end for other_start, other_end in others):
                raise DataError(f"items[{i}]: the chat template writes other messages into this answer")
            turns[i] = [(start, end)]
        return turns

    def _start_of_answer(self, conversation: Conversation, i: int, text: str, found: Marks) -> int:
        """Where message i begins in the text: behind what the prompt for it ends with.

        The prompt as a whole need not be in the text: with more messages, templates write the earlier ones otherwise
        (without their reasoning, say). So the two are followed from the last place that both have: the end of what some
        message says.
        """
        before = replace(conversation, items=conversation.items[:i])
        try:
            prompt, in_prompt = self._marked(before, add_generation_prompt=True)
        except DataError as error:
            if i == 0 and (start := self._start_of_first(conversation, text, found)) is not None:
                return start
            raise DataError(f"items[{i}]: the chat template has no prompt for this message: {error}") from None
        places = [(stretches[-1][1], label) for label, stretches in in_prompt.items() if label in found]
        place, label = max(places, default=(0, None))
        since = found[label][-1][1] if label else 0
        opening = prompt[place:]
        if not text.startswith(opening, since):  # a prompt may begin reasoning that this answer does not have
            opening = opening.partition("<think")[0]
        if not text.startswith(opening, since):
            raise DataError(f"items[{i}]: the chat template does not write this message where it would be answered")
        return since + len(opening)

    def _start_of_first(self, conversation: Conversation, text: str, found: Marks) -> int | None:
        """Where the answer begins that nothing precedes, for templates that refuse to prompt for it: behind what they
        open an answer to a question with. None where that is not in the text."""
        prompt, _ = self._marked(replace(conversation, items=(Message("user", "x"),)), add_generation_prompt=True)
        opening = prompt.rpartition(self.eot)[2].lstrip()
        said = [start for kind in SAID for start, _ in found.get((kind, 0), [])]
        place = text.rfind(opening, 0, min(said, default=0))
        return None if place < 0 or not opening else place + len(opening)


@lru_cache(maxsize=8)
def compiled(source: str, eot: str, date: str, variables: tuple[tuple[str, str], ...]) -> RenderedChat:
    """The chat template, compiled once. Raises: ConfigError for a syntax error or a wrong date."""
    return RenderedChat(source, eot, parse_date(date), dict(variables))


def default_system(chat: RenderedChat, tokenizer: Tokenizer) -> str:
    """What the template writes where a conversation has no system text, with its headers; "" where it writes nothing.

    Raises: DataError where it refuses a plain question.
    """
    asked = "Why?"
    before, _, _ = chat.render(Conversation((Message("user", asked),))).partition(asked)
    parts = tokenizer.split_at_specials(before)  # text, special token, text, ...: of all turns, the last the question's
    ends = [i for i in range(1, len(parts), 2) if parts[i] == chat.eot]
    return "".join(parts[: ends[-1]]).strip() if ends else ""


def segments(
    chat: RenderedChat, conversation: Conversation, tokenizer: Tokenizer, *, needs_reasoning: bool = False
) -> list[Segment]:
    """The conversation as segments: one, if no message spells a special token, else one for each that is special.

    Raises: DataError for a conversation that the template cannot write; with `needs_reasoning` also if it leaves out
    any reasoning.
    """
    laid_out = chat.lay_out(conversation, tokenizer.special_tokens, needs_reasoning=needs_reasoning)
    return _split(laid_out, tokenizer)


def prompt_segments(chat: RenderedChat, conversation: Conversation, begun: str, tokenizer: Tokenizer) -> list[Segment]:
    """The conversation up to where the assistant answers and what it has `begun` to say, as segments without roles."""
    text, from_record = chat.lay_out_prompt(conversation)
    whole = text + begun
    return _split(
        LaidOut(whole, Characters.of(len(whole), "prefix", None), [*from_record, (len(text), len(whole))]), tokenizer
    )


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


def _characters(conversation: Conversation, text: str, found: Marks, turns: Turns) -> Characters:
    """Role and weight of each character; what no message says is the template's own, of weight 0."""
    roles, weights = np.full(len(text), ROLE_IDS["prefix"], np.uint8), np.full(len(text), np.nan, np.float32)
    for start, end in found.get(SYSTEM, []):
        roles[start:end] = ROLE_IDS["system"]
    for i, message in enumerate(conversation.items):
        for start, end in turns[i]:
            roles[start:end] = ROLE_IDS[message.role]
            if message.weight is not None:
                weights[start:end] = message.weight
        if message.spans:
            first = len(message.content) - len(message.content.lstrip())  # blanks in front may be trimmed
            for start, end in found.get(("content", i), []):
                if text[start:end] != message.content.strip():
                    raise DataError(f"items[{i}]: the chat template rewrites this message, so spans cannot weigh it")
                for span in message.spans:
                    weights[start + max(span.start - first, 0) : min(start + span.end - first, end)] = span.weight
    return Characters(roles, weights)


def _from_record(found: Marks) -> list[Stretch]:
    return sorted(stretch for label, stretches in found.items() if label != GENERATED for stretch in stretches)


def _check_complete(conversation: Conversation, found: Marks) -> None:
    """Raises: DataError unless the template writes the system text, all messages, calls and tools."""
    expected: list[tuple[Label, str, str]] = [(SYSTEM, conversation.system, "the system text")]
    expected += [(("tool", i), "x", "tools") for i in range(len(conversation.tools))]
    for i, message in enumerate(conversation.items):
        expected.append((("content", i), message.content, f"the content of message {i + 1}"))
        expected += [(("tool call", i), "x", f"the tool calls of message {i + 1}") for _ in message.tool_calls[:1]]
    for label, text, what in expected:
        if text.strip() and label not in found:
            raise DataError(f"the chat template leaves out {what}; choose another --template, or leave the record out")


def _check_faithful(conversation: Conversation, found: Marks, text: str, plain: str) -> None:
    """Raises: DataError unless marks change nothing (`plain` is without), and contents come once each and in order."""
    contents = [found[("content", i)] for i in range(len(conversation.items)) if ("content", i) in found]
    flat = [place for stretches in contents for stretch in stretches for place in stretch]
    if text != plain or any(len(stretches) > 1 for stretches in contents) or flat != sorted(flat):
        raise DataError("the chat template changes what messages say, so that they cannot be found in its text")
    for i, message in enumerate(conversation.items):  # a template that finds roles in its own text may find them there
        for start, end in found.get(("content", i), []) if conversation.condition else []:
            if text.count(conversation.condition, start, end) > message.content.count(conversation.condition):
                raise DataError(f"items[{i}]: the chat template writes the class into this message: it spells a role")


def _check_special_tokens(conversation: Conversation, special_tokens: Iterable[str]) -> None:
    """Raises: DataError if a special token is spelt where it cannot be told from the template's own."""
    items = conversation.items
    unmarked = [[message.tool_calls, message.name, message.tool_call_id] for message in items]
    if conversation.tools or any(any(each) for each in unmarked):
        text = json.dumps([unmarked, conversation.tools], ensure_ascii=False)
        for token in special_tokens:
            if token in text:
                raise DataError(f"tools: they spell the special token {token!r}; rename it")
