"""Find the turns of a record, whatever its format, and give them the weights that the record lists.

    turns = TurnReader(record, fields, notes, MessageReader()).turns()
    system, items = split_system(weighted(turns, fields), fields)

A turn keeps its place in the record for messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ochat.errors import DataError
from ochat.text.conversation import Message, default_weight
from ochat.text.fields import check_number, check_object, check_text, describe, shorten
from ochat.text.records.calls import read_calls
from ochat.text.records.content import read_parts
from ochat.text.records.keys import IGNORE, MESSAGE, RECORD, has_content
from ochat.text.records.messages import MessageReader, Turn
from ochat.text.records.objects import Fields, Notes, check_truth, read_fields

QUESTION = ("history", "question", "extra")  # meanings that make the turns before the answer
_BESIDE_ANSWER = ("reasoning", "tool_calls")
_PAIR = ("question", "extra", "answer", *_BESIDE_ANSWER, "weight", "trained")
_END = r"\s*(?::|\|?[>\]]:?)"
_TRANSCRIPT = re.compile(rf"\W*(?:human|user){_END}.*\b(?:assistant|ai|gpt|moss){_END}", re.IGNORECASE | re.DOTALL)


@dataclass(slots=True)
class TurnReader:
    """The turns of one record. `record`: with all its keys; `fields`: those that are read; `columns`: as read_fields
    takes them."""

    record: dict[str, Any]
    fields: Fields
    notes: Notes
    messages: MessageReader
    columns: Mapping[str, str] = field(default_factory=dict)

    def turns(self) -> list[Turn]:
        """Messages, or question and answer. Raises: DataError."""
        if "messages" in self.fields:
            turns = self._listed()
        elif "answer" in self.fields or "tool_calls" in self.fields:
            turns = [*self._question(), *self._answer()]
        else:
            raise self._no_turns()
        self._check_text(turns)
        return turns

    def prompt(self) -> list[Turn]:
        """The turns up to the last question. Raises: DataError if there is none."""
        turns = self._listed() if "messages" in self.fields else self._question()
        turns = turns[:-1] if turns[-1].message.role == "assistant" else turns
        if not turns:
            raise DataError("record: an answer without a question; a prompt needs a user message")
        return turns

    def answered(self, columns: Iterable[str]) -> dict[str, list[Turn]]:
        """Column -> the prompt and the answer that the column has, of those columns that the record has.

        What all of them begin with is the prompt, of which nothing is trained. Raises: DataError.
        """
        columns = [column for column in columns if self.record.get(column) is not None]
        if not columns:
            raise DataError("record: none of the columns that the map names as answers")
        self._check_alone(columns[0])
        if "answer" in self.fields:
            name = self.fields.name("answer")
            raise DataError(f"{name}: the map names other answers; name it among them, or {IGNORE} {name}")
        found = {
            column: self.messages.turns(self.record[column], column, "assistant", self.notes) for column in columns
        }
        if empty := [column for column, turns in found.items() if not turns]:
            raise DataError(f"{empty[0]}: empty; an answer has at least one message")
        replies = [column for column, turns in found.items() if turns[0].message.role == "assistant"]
        whole = next((turns for column, turns in found.items() if column not in replies), [])
        if whole:
            prompt = whole[:-1]
            said = [turn.message for turns in found.values() for turn in turns]
            for meaning in ("messages", *QUESTION):
                self._check_said(meaning, said, columns[0])
        elif "messages" in self.fields or not self.fields.values.keys().isdisjoint(QUESTION):
            prompt = self._listed() if "messages" in self.fields else self._question()
        else:
            _check_transcript(found[columns[0]][0])
            raise self._no_turns()
        if replies and prompt[-1].message.role == "assistant":
            raise DataError(
                f"{prompt[-1].place}: an answer where {replies[0]} should follow; take it out, or name its column in "
                "[answers] too"
            )
        found |= {column: prompt + found[column] for column in replies}
        shared = 0 if whole and len(found) == 1 else min(len(prompt), _num_shared(list(found.values())))
        turns = {column: as_prompt(turns[:shared]) + turns[shared:] for column, turns in found.items()}
        self._check_text([turn for each in turns.values() for turn in each])
        return turns

    def _listed(self) -> list[Turn]:
        """The messages of a list. Raises: DataError if the record says anything else beside them."""
        name, turns = self.fields.names["messages"], self._messages()
        if not turns:
            raise DataError(f"{name}: empty; a conversation needs at least one message")
        if others := self.fields.values.keys() & {*QUESTION, "answer"}:
            for meaning in sorted(others):
                self._check_said(meaning, [turn.message for turn in turns], name)
        self._check_alone(name)
        return turns

    def _messages(self) -> list[Turn]:
        """Those of a list of messages, of pairs, or of texts."""
        name, values = self.fields.names["messages"], self.fields.list("messages")
        first = values[0] if values else None
        if isinstance(first, str) and all(isinstance(value, str) for value in values):
            roles = ("user", "assistant")
            said = (self.messages.turns(v, f"{name}[{i}]", roles[i % 2], self.notes) for i, v in enumerate(values))
        elif isinstance(first, dict) and not first.get("role") and self._is_pair(first):
            said = (self._pair(value, f"{name}[{i}]", i == 0) for i, value in enumerate(values))
        else:
            return self.messages.turns(values, name, "user", self.notes)
        return [turn for each in said for turn in each]

    def _is_pair(self, value: dict[str, Any]) -> bool:
        """Whether an object in place of a message holds a question and its answer."""
        names = [name for name, item in value.items() if item is not None]
        if any(name in self.messages.columns or MESSAGE.meanings.get(name) == "role" for name in names):
            return False
        meanings = {self.columns.get(name) or RECORD.meanings.get(name) for name in names}
        return "answer" in meanings and not meanings.isdisjoint(("question", "extra"))

    def _pair(self, value: Any, place: str, is_first: bool) -> list[Turn]:
        """The turns of an object with a question and its answer, with its weight. Raises: DataError."""
        check_object(value, place)
        try:
            fields = read_fields(value, RECORD, self.notes, self.columns)
            system = [Turn("system", Message("system", read_system(fields, self.notes)))] if is_first else []
            for meaning, name in fields.names.items():
                if meaning not in _PAIR and not (meaning == "system" and is_first):
                    raise DataError(f"{name}: it is not read beside a question and its answer; {IGNORE} {name}")
            turns = weighted(TurnReader(value, fields, self.notes, self.messages).turns(), fields)
        except DataError as error:
            raise DataError(f"{place}.{error}") from None
        return [turn._replace(place=f"{place}.{turn.place}") for turn in [*system, *turns]]

    def _check_alone(self, by: str) -> None:
        """Raises: DataError for what belongs to an answer that is a text."""
        for meaning in _BESIDE_ANSWER:
            if has_content(self.fields.values.get(meaning)):
                raise self._misplaced(meaning, by)

    def _check_text(self, turns: list[Turn]) -> None:
        """Count a text in which all that is said stands. Raises: DataError for others."""
        if "text" not in self.fields:
            return
        name, text = self.fields.names["text"], self.fields.text("text")
        if any(line.strip() not in text for turn in turns for line in turn.message.content.splitlines()):
            raise DataError(f"{name}: it says something else than the rest of the record; {IGNORE} {name}")
        self.notes.leave_out(RECORD, name)

    def _check_said(self, meaning: str, said: list[Message], by: str) -> None:
        """Count a key whose messages are all `said`, and are so no loss. Raises: DataError for others."""
        if meaning not in self.fields:
            return
        name = self.fields.names[meaning]
        texts = {message.content.strip() for message in said} | {""}
        for turn in self._read(meaning):
            is_text = turn.message == Message(turn.message.role, turn.message.content)
            if turn.message in said or (is_text and turn.message.content.strip() in texts):
                continue
            prompt = f', or --map with question = "{by}" for a prompt' if meaning == "answer" else ""
            raise DataError(
                f"{name}: the record has {by} as well; choose with {IGNORE} {name} or {IGNORE} {by}{prompt}"
            )
        self.notes.leave_out(RECORD, name)

    def _question(self) -> list[Turn]:
        """Earlier turns, and the question with what stands below it. Raises: DataError if there is no question."""
        asked = {self.fields.names[m]: self.fields.values[m] for m in ("question", "extra") if m in self.fields}
        said = {name: value for name, value in asked.items() if value not in ("", [])} or asked
        if not said:
            raise self._no_turns()
        (name, value), *below = said.items()
        if below and not all(isinstance(text, str) for text in said.values()):
            extra, more = below[0]
            what = f"{describe(more)} cannot be put below {name}" if isinstance(value, str) else f"{name} is no text"
            raise DataError(f"{extra}: {what}; write it into {name}, or {IGNORE} {extra}")
        if isinstance(value, str):
            texts = [check_text(text, place) for place, text in said.items()]
            turns = self.messages.turns("\n\n".join(texts), name, "user", self.notes)
            _check_transcript(turns[0], is_open=True)
        else:
            turns = as_prompt(self.messages.turns(value, name, "user", self.notes))
        return [*self._read("history"), *turns]

    def _answer(self) -> list[Turn]:
        """The answer, with the reasoning and the calls that stand beside it."""
        turns = self._read("answer", "assistant")
        beside: dict[str, Any] = {}
        if reasoning := self.fields.reasoning():
            beside["reasoning"] = reasoning
        if "tool_calls" in self.fields:
            name = self.fields.names["tool_calls"]
            beside["tool_calls"] = tuple(read_calls(self.fields.values["tool_calls"], name, self.notes))
            turns = turns or [Turn(name, Message("assistant", ""))]
        if not beside:
            return turns
        (turn, *others) = turns or [Turn("", Message("user", ""))]
        if others or turn.message.role != "assistant" or any(getattr(turn.message, meaning) for meaning in beside):
            raise self._misplaced(next(iter(beside)), self.fields.name("answer"))
        return [turn._replace(message=replace(turn.message, **beside))]

    def _misplaced(self, meaning: str, by: str) -> DataError:
        name = self.fields.name(meaning)
        return DataError(f"{name}: it is not read beside messages; write it into {by}, or {IGNORE} {name}")

    def _read(self, meaning: str, role: str = "user") -> list[Turn]:
        """The turns under one key, [] if it is missing."""
        if meaning not in self.fields:
            return []
        if meaning in ("history", "messages"):
            return self._history() if meaning == "history" else self._messages()
        return self.messages.turns(self.fields.values[meaning], self.fields.names[meaning], role, self.notes)

    def _history(self) -> list[Turn]:
        """Pairs of question and answer, or messages."""
        name, turns = self.fields.names["history"], []
        for i, pair in enumerate(self.fields.list("history")):
            place = f"{name}[{i}]"
            if isinstance(pair, dict):
                turns += self.messages.turns(pair, place, "user", self.notes)
                continue
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(f"{place}: [question, answer] or a message is needed")
            for number, role in enumerate(("user", "assistant")):
                turns += self.messages.turns(pair[number], f"{place}[{number}]", role, self.notes)
        return turns

    def _no_turns(self) -> DataError:
        if not self.record.keys().isdisjoint(MESSAGE.names("role")):
            return DataError("record: it is one message; make a record of all messages of its conversation")
        if "text" in self.fields:
            name = self.fields.names["text"]
            return DataError(f"{name}: text without roles; write messages, or name its columns with --map")
        shown = ", ".join(repr(shorten(name)) for name in list(self.record)[:8]) or "no keys"
        named = {meaning: ", ".join(RECORD.names(meaning)) for meaning in ("messages", "question", "answer")}
        return DataError(
            f"record: no messages ({named['messages']}), and no question with an answer ({named['question']}; "
            f"{named['answer']}); it has {shown}; name its columns with --map, which ochat prepare --describe writes"
        )


def _check_transcript(turn: Turn, is_open: bool = False) -> None:
    """Raises: DataError for a text that holds several turns. `is_open`: only if it ends where the answer follows."""
    text = turn.message.content
    if _TRANSCRIPT.match(text) and (not is_open or text.rstrip()[-1] in ":>]"):
        raise DataError(f"{turn.place}: a transcript of several turns in one text; write messages")


def as_prompt(turns: list[Turn]) -> list[Turn]:
    """The turns, of which nothing is trained that has no weight."""
    return [turn._replace(is_prompt=True) for turn in turns]


def weighted(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns with the weights that the record lists, each multiplied by the record's own. Raises: DataError."""
    if "weights" in fields:
        turns = _with_list(turns, fields.name("weights"), fields.list("weights"), check_number)
    if "mask" in fields:
        turns = _with_list(turns, fields.name("mask"), _mask(turns, fields), check_truth)
    turns = [_untrained(turn) if turn.is_prompt else turn for turn in turns]
    scale = fields.weight()
    return turns if scale is None else [turn._replace(message=_scaled(turn.message, scale)) for turn in turns]


def _untrained(turn: Turn) -> Turn:
    is_answer = turn.message.role == "assistant" and turn.message.weight is None
    return turn._replace(message=replace(turn.message, weight=0.0)) if is_answer else turn


def _mask(turns: list[Turn], fields: Fields) -> list[Any]:
    """The mask of each message, None where it says nothing. NeMo names the role that is not trained."""
    mask, name = fields.values["mask"], fields.names["mask"]
    if not isinstance(mask, str) or not mask.strip().isalpha():
        return fields.list("mask")
    if mask.strip().lower() not in ("user", "human"):
        raise DataError(f"{name}: {describe(mask)} is not read, only User or a list of 1 and 0; write loss_mask")
    return [0 if turn.message.role == "user" else None for turn in turns]


def _with_list(turns: list[Turn], name: str, values: list[Any], check: Callable[[Any, str], float]) -> list[Turn]:
    if len(values) != len(turns):
        raise DataError(f"{name}: {len(values)} values for {len(turns)} messages; one for each is needed")
    found = []
    for i, (turn, value) in enumerate(zip(turns, values, strict=True)):
        if value is not None:
            own = 1.0 if turn.message.weight is None else turn.message.weight
            weight = check_number(own * check(value, f"{name}[{i}]"), f"{name}[{i}]")
            turn = turn._replace(message=replace(turn.message, weight=weight))
        found.append(turn)
    return found


def _scaled(message: Message, scale: float) -> Message:
    weight = default_weight(message.role) or None if message.weight is None else message.weight
    weight = None if weight is None else check_number(weight * scale, "weight")
    spans = (span._replace(weight=check_number(span.weight * scale, "weight")) for span in message.spans)
    return replace(message, weight=weight, spans=tuple(spans))


def read_system(fields: Fields, notes: Notes) -> str:
    """The system text of a record, "" if it has none; content parts are joined. Raises: DataError."""
    value = fields.values.get("system")
    if not isinstance(value, list):
        return fields.text("system")
    name = fields.names["system"]
    try:
        content = read_parts(value, notes)
    except DataError as error:
        raise DataError(f"{name}{error}") from None
    if content.reasoning or content.spans:
        raise DataError(f"{name}: the system text has neither reasoning nor weights; remove them")
    return check_text(content.text, name)


def split_system(turns: list[Turn], fields: Fields, notes: Notes) -> tuple[str, tuple[Message, ...]]:
    """The system text, of the first message or of the record, and the other messages. Raises: DataError."""
    system = read_system(fields, notes) if "system" in fields.values else ""
    first, *others = turns
    if first.message.role == "system":
        if first.message.weight or first.message.spans:
            raise DataError(f"{first.place}: the system text is never trained on; remove its weight")
        if system and first.message.content and system != first.message.content:
            name = fields.name("system")
            raise DataError(f"{name}: {first.place} has another system text; keep one of the two with {IGNORE} {name}")
        system = system or first.message.content
        turns = others
    for turn in turns:
        if turn.message.role == "system":
            raise DataError(f"{turn.place}: a system message after the first message cannot be expressed")
    if not turns:
        raise DataError(f"{first.place}: only a system message; a conversation needs a user or assistant message")
    return system, tuple(turn.message for turn in turns)


def _num_shared(conversations: list[list[Turn]]) -> int:
    """How many messages all have in common at the beginning; the last of each is never counted."""
    shared = 0
    for turns in zip(*(each[:-1] for each in conversations), strict=False):
        if any(turn.message != turns[0].message for turn in turns):
            break
        shared += 1
    return shared
