"""Find the turns of a record, whatever its format, and give them the weights that the record lists.

    turns = TurnReader(record, fields, notes, MessageReader()).turns()
    system, items = split_system(weighted(turns, fields), fields)

A turn keeps its place in the record for messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ochat.errors import DataError
from ochat.text.conversation import Message, default_weight
from ochat.text.fields import check_number, check_text, shorten
from ochat.text.records.keys import IGNORE, RECORD
from ochat.text.records.messages import MessageReader, Turn
from ochat.text.records.objects import Fields, Notes, check_truth

QUESTION = ("history", "question", "extra")  # meanings that make the turns before the answer
_BESIDE = {*QUESTION, "answer"}


@dataclass(slots=True)
class TurnReader:
    """The turns of one record. `record`: with all its keys; `fields`: those that are read."""

    record: dict[str, Any]
    fields: Fields
    notes: Notes
    messages: MessageReader

    def turns(self) -> list[Turn]:
        """Messages, or question and answer. Raises: DataError."""
        if "messages" in self.fields:
            return self._listed()
        if "answer" not in self.fields:
            raise self._no_turns()
        return [*self._question(), *self._answer()]

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
        if self.fields.values.get("reasoning"):
            raise self._misplaced("reasoning", columns[0])
        if "answer" in self.fields:
            name = self.fields.name("answer")
            raise DataError(f"{name}: the map names other answers; name it among them, or {IGNORE} {name}")
        found = {
            column: self.messages.turns(self.record[column], column, "assistant", self.notes) for column in columns
        }
        if empty := [column for column, turns in found.items() if not turns]:
            raise DataError(f"{empty[0]}: empty; an answer has at least one message")
        replies = [column for column, turns in found.items() if turns[0].message.role == "assistant"]
        if not replies:
            said = [turn.message for turns in found.values() for turn in turns]
            for meaning in ("messages", *QUESTION):
                self._check_said(meaning, said, columns[0])
            prompt = []
        elif len(replies) < len(found):
            raise DataError(f"{replies[0]}: it begins with the answer, but other columns with the prompt")
        else:
            prompt = as_prompt(self._listed() if "messages" in self.fields else self._question())
            if prompt[-1].message.role == "assistant":
                raise DataError(f"{prompt[-1].place}: an answer where {columns[0]} should follow; take it out")
            found = {column: prompt + turns for column, turns in found.items()}
        shared = len(prompt) if replies or len(found) == 1 else _num_shared(list(found.values()))
        return {column: as_prompt(turns[:shared]) + turns[shared:] for column, turns in found.items()}

    def _listed(self) -> list[Turn]:
        """The messages of a list. Raises: DataError if the record says anything else beside them."""
        name = self.fields.names["messages"]
        if self.fields.values.get("reasoning"):
            raise self._misplaced("reasoning", name)
        turns = self.messages.turns(self.fields.list("messages"), name, "user", self.notes)
        if not turns:
            raise DataError(f"{name}: empty; a conversation needs at least one message")
        if others := self.fields.values.keys() & _BESIDE:
            for meaning in sorted(others):
                self._check_said(meaning, [turn.message for turn in turns], name)
        return turns

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
            raise DataError(f"{name}: the record has {by} as well; choose with {IGNORE} {name} or {IGNORE} {by}")
        self.notes.leave_out(RECORD, name)

    def _question(self) -> list[Turn]:
        """Earlier turns, and the question with what stands below it. Raises: DataError if there is no question."""
        if "question" not in self.fields and "extra" not in self.fields:
            raise self._no_turns()
        question, extra = self._read("question"), self._read("extra")
        is_text = isinstance(self.fields.values.get("question"), str)
        if question and extra and extra[0].message.content:
            if not is_text:
                what = f"it cannot be put below {self.fields.name('question')}, which holds messages"
                raise DataError(f"{self.fields.name('extra')}: {what}; {IGNORE} {self.fields.name('extra')}")
            text = f"{question[0].message.content}\n\n{extra[0].message.content}"
            question = [Turn(question[0].place, Message("user", text))]
        return [*self._read("history"), *((question if is_text else as_prompt(question)) or extra)]

    def _answer(self) -> list[Turn]:
        """The answer, with the reasoning that stands beside it."""
        turns, reasoning = self._read("answer", "assistant"), self.fields.text("reasoning")
        if not reasoning:
            return turns
        if len(turns) != 1 or turns[0].message.role != "assistant" or turns[0].message.reasoning:
            raise self._misplaced("reasoning", self.fields.name("answer"))
        return [turns[0]._replace(message=replace(turns[0].message, reasoning=reasoning))]

    def _misplaced(self, meaning: str, by: str) -> DataError:
        name = self.fields.name(meaning)
        return DataError(f"{name}: it is not read beside messages; write it into {by}, or {IGNORE} {name}")

    def _read(self, meaning: str, role: str = "user") -> list[Turn]:
        """The turns under one key, [] if it is missing."""
        if meaning not in self.fields:
            return []
        if meaning == "history":
            return self._history()
        value, name = self.fields.values[meaning], self.fields.names[meaning]
        return self.messages.turns(check_text(value, name) if meaning == "extra" else value, name, role, self.notes)

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
        shown = ", ".join(repr(shorten(name)) for name in list(self.record)[:8]) or "no keys"
        named = {meaning: ", ".join(RECORD.names(meaning)) for meaning in ("messages", "question", "answer")}
        return DataError(
            f"record: no messages ({named['messages']}), and no question with an answer ({named['question']}; "
            f"{named['answer']}); it has {shown}; name its columns with --map, which ochat prepare --describe writes"
        )


def as_prompt(turns: list[Turn]) -> list[Turn]:
    """The turns, of which nothing is trained that has no weight."""
    return [turn._replace(is_prompt=True) for turn in turns]


def weighted(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns with the weights that the record lists, each multiplied by the record's own. Raises: DataError."""
    if "weights" in fields:
        turns = _with_list(turns, fields, "weights", check_number)
    if "mask" in fields and not _is_user(fields.values["mask"]):  # NeMo names the role that is not trained
        turns = _with_list(turns, fields, "mask", check_truth)
    turns = [_untrained(turn) if turn.is_prompt else turn for turn in turns]
    scale = fields.weight()
    return turns if scale is None else [turn._replace(message=_scaled(turn.message, scale)) for turn in turns]


def _untrained(turn: Turn) -> Turn:
    is_answer = turn.message.role == "assistant" and turn.message.weight is None
    return turn._replace(message=replace(turn.message, weight=0.0)) if is_answer else turn


def _is_user(mask: Any) -> bool:
    return isinstance(mask, str) and mask.strip().lower() in ("user", "human")


def _with_list(turns: list[Turn], fields: Fields, meaning: str, check: Callable[[Any, str], float]) -> list[Turn]:
    name, values = fields.name(meaning), fields.list(meaning)
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


def split_system(turns: list[Turn], fields: Fields) -> tuple[str, tuple[Message, ...]]:
    """The system text, of the first message or of the record, and the other messages. Raises: DataError."""
    system = fields.text("system") if "system" in fields.values else ""
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
