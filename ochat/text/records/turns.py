"""Find the turns of a record, whatever its format: messages, pairs, texts, or a question and its answer.

    turns = TurnReader(record, fields, MessageReader()).turns()

A turn keeps its place in the record for messages. answers.py reads several answers of a record, weights.py the weights
that it lists, system.py its system text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from ochat.errors import DataError
from ochat.text.conversation import Message
from ochat.text.fields import check_object, check_text
from ochat.text.records.calls import read_calls
from ochat.text.records.keys import MESSAGE, RECORD
from ochat.text.records.levels import IGNORE, has_content
from ochat.text.records.messages import MessageReader, Turn, as_prompt
from ochat.text.records.objects import Fields, read_fields
from ochat.text.records.system import read_system
from ochat.text.records.weights import weighted

QUESTION = ("history", "question", "extra")  # meanings that make the turns before the answer
_BESIDE_ANSWER = ("reasoning", "tool_calls")
_PAIR = ("question", "extra", "answer", *_BESIDE_ANSWER, "weight", "trained")
_END = r"\s*(?::|\|?[>\]]:?)"
_TRANSCRIPT = re.compile(rf"\W*(?:human|user){_END}.*\b(?:assistant|ai|gpt|moss){_END}", re.IGNORECASE | re.DOTALL)


@dataclass(slots=True)
class TurnReader:
    """The turns of one record. `record`: with all its keys; `fields`: those that are read."""

    record: dict[str, Any]
    fields: Fields
    messages: MessageReader

    def turns(self) -> list[Turn]:
        """Messages, or question and answer. Raises: DataError."""
        if "messages" in self.fields:
            turns = self._listed()
        elif "answer" in self.fields or "tool_calls" in self.fields:
            turns = [*self._question(), *self._answer()]
        else:
            raise self.no_turns()
        self.check_text_key(turns)
        return turns

    def prompt(self) -> list[Turn]:
        """The turns up to the last question. Raises: DataError if there is none."""
        turns = self.asked()
        turns = turns[:-1] if turns and turns[-1].message.role == "assistant" else turns
        if not turns:
            raise DataError("record: an answer without a question; a prompt needs a user message")
        return turns

    def asked(self) -> list[Turn]:
        """The messages, else the question with what stands before and below it. Raises: DataError."""
        return self._listed() if "messages" in self.fields else self._question()

    def _listed(self) -> list[Turn]:
        """The messages of a list. Raises: DataError if the record says anything else beside them."""
        name, turns = self.fields.names["messages"], self._read("messages")
        if not turns:
            raise DataError(f"{name}: empty; a conversation needs at least one message")
        for meaning in sorted(self.fields.values.keys() & {*QUESTION, "answer"}):
            self.check_said(meaning, turns, name)
        self.check_alone(name)
        return turns

    def _read(self, meaning: str) -> list[Turn]:
        """The turns under one key, [] if it is missing: of `messages` and `history` those of a list."""
        if meaning not in self.fields:
            return []
        name, value = self.fields.names[meaning], self.fields.values[meaning]
        if meaning not in ("messages", "history"):
            return self.messages.turns(value, name, "assistant" if meaning == "answer" else "user", self.fields.notes)
        values = self.fields.list(meaning)
        first = values[0] if values else None
        if meaning == "history" and first is not None and not isinstance(first, dict):
            said = [self._in_turn(value, f"{name}[{i}]", 2) for i, value in enumerate(values)]
        elif isinstance(first, dict) and not first.get("role") and self._is_pair(first):
            said = [self._pair(value, f"{name}[{i}]", i == 0) for i, value in enumerate(values)]
        elif isinstance(first, str) and all(isinstance(value, str) for value in values):
            return self._in_turn(values, name, len(values))
        else:
            return self.messages.turns(values, name, "user", self.fields.notes)
        return [turn for turns in said for turn in turns]

    def _in_turn(self, values: Any, place: str, length: int) -> list[Turn]:
        """What user and assistant say in turn."""
        if not isinstance(values, list) or len(values) != length:
            raise DataError(f"{place}: [question, answer] or a message is needed")
        roles = ("user", "assistant")
        said = (self.messages.turns(v, f"{place}[{i}]", roles[i % 2], self.fields.notes) for i, v in enumerate(values))
        return [turn for turns in said for turn in turns]

    def _is_pair(self, value: dict[str, Any]) -> bool:
        """Whether an object in place of a message holds a question and its answer."""
        names = [name for name, item in value.items() if item is not None]
        if any(name in self.messages.columns or MESSAGE.meanings.get(name) == "role" for name in names):
            return False
        meanings = {self.fields.columns.get(name) or RECORD.meanings.get(name) for name in names}
        return "answer" in meanings and not meanings.isdisjoint(("question", "extra"))

    def _pair(self, value: Any, place: str, is_first: bool) -> list[Turn]:
        """The turns of an object with a question and its answer, with its weight. Raises: DataError."""
        check_object(value, place)
        try:
            fields = read_fields(value, RECORD, self.fields.notes, self.fields.columns)
            said = read_system(fields) if is_first else ""
            system = [Turn(fields.name("system"), Message("system", said))] if said else []
            for meaning, name in fields.names.items():
                if meaning not in _PAIR and not (meaning == "system" and is_first):
                    raise RECORD.refusal(name, "it is not read beside a question and its answer")
            turns = weighted(TurnReader(value, fields, self.messages).turns(), fields)
        except DataError as error:
            raise DataError(f"{place}.{error}") from None
        return [turn._replace(place=f"{place}.{turn.place}") for turn in [*system, *turns]]

    def check_alone(self, by: str) -> None:
        """Raises: DataError for what belongs to an answer that is a text."""
        for meaning in _BESIDE_ANSWER:
            if has_content(self.fields.values.get(meaning)):
                raise self._misplaced(meaning, by)

    def check_text_key(self, turns: list[Turn]) -> None:
        """Count a text in which all that is said stands. Raises: DataError for others."""
        if "text" not in self.fields:
            return
        text = self.fields.text("text")
        if any(line.strip() not in text for turn in turns for line in turn.message.content.splitlines()):
            raise self.fields.refusal("text", "it says something else than the rest of the record")
        self.fields.leave_out("text")

    def check_said(self, meaning: str, turns: list[Turn], by: str) -> None:
        """Count a key whose messages are all among the turns, and are so no loss. Raises: DataError for others."""
        if meaning not in self.fields:
            return
        said = [turn.message for turn in turns]
        texts = {message.content.strip() for message in said} | {""}
        for turn in self._read(meaning):
            is_text = turn.message == Message(turn.message.role, turn.message.content)
            if turn.message in said or (is_text and turn.message.content.strip() in texts):
                continue
            prompt = f', or --map with question = "{by}" for a prompt' if meaning == "answer" else ""
            raise self.fields.refusal(meaning, f"the record has {by} as well; keep it with {IGNORE} {by}{prompt}")
        self.fields.leave_out(meaning)

    def _question(self) -> list[Turn]:
        """Earlier turns, and the question with what stands below it. Raises: DataError if there is no question."""
        asked = {self.fields.names[m]: self.fields.values[m] for m in ("question", "extra") if m in self.fields}
        said = {name: value for name, value in asked.items() if value not in ("", [])} or asked
        if not said:
            raise self.no_turns()
        name, *below = said
        if all(isinstance(text, str) for text in said.values()):
            texts = [check_text(text, place) for place, text in said.items()]
            turns = self.messages.turns("\n\n".join(texts), name, "user", self.fields.notes)
            check_transcript(turns[0], is_open=True)
        elif below:
            raise RECORD.refusal(below[0], f"only text can be put below text; write it into {name}")
        else:
            turns = as_prompt(self.messages.turns(said[name], name, "user", self.fields.notes))
        return [*self._read("history"), *turns]

    def _answer(self) -> list[Turn]:
        """The answer, with the reasoning and the calls that stand beside it."""
        turns = self._read("answer")
        beside: dict[str, Any] = {}
        if reasoning := self.fields.reasoning():
            beside["reasoning"] = reasoning
        if "tool_calls" in self.fields:
            name = self.fields.names["tool_calls"]
            beside["tool_calls"] = tuple(read_calls(self.fields.values["tool_calls"], name, self.fields.notes))
            turns = turns or [Turn(name, Message("assistant", ""))]
        if not beside:
            return turns
        (turn, *others) = turns or [Turn("", Message("user", ""))]
        if others or turn.message.role != "assistant" or any(getattr(turn.message, meaning) for meaning in beside):
            raise self._misplaced(next(iter(beside)), self.fields.name("answer"))
        return [turn._replace(message=replace(turn.message, **beside))]

    def _misplaced(self, meaning: str, by: str) -> DataError:
        return self.fields.refusal(meaning, f"it is not read beside messages; write it into {by}")

    def no_turns(self) -> DataError:
        if not self.record.keys().isdisjoint(MESSAGE.names("role")):
            return DataError("record: it is one message; make a record of all messages of its conversation")
        if "text" in self.fields:
            name = self.fields.names["text"]
            return DataError(f"{name}: text without roles; write messages, or name its columns with --map")
        messages, question, answer = (", ".join(RECORD.names(each)) for each in ("messages", "question", "answer"))
        wanted = f"no messages ({messages}), no question ({question}) and answer ({answer}){self.fields.others()}"
        return DataError(f"record: {wanted}; name its columns with --map, which ochat prepare --describe writes")


def check_transcript(turn: Turn, is_open: bool = False) -> None:
    """Raises: DataError for a text that holds several turns. `is_open`: only if it ends where the answer follows."""
    text = turn.message.content
    if _TRANSCRIPT.match(text) and (not is_open or text.rstrip()[-1] in ":>]"):
        raise DataError(f"{turn.place}: a transcript of several turns in one text; write messages")
