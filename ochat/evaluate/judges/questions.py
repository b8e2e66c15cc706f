"""Questions of AlpacaEval, MT-bench and Vicuna-bench as they are published, and answers as their judges read them.

    questions = read(Path("alpaca_eval.json"), "alpaca_eval");  write(Path("model_outputs.json"), ...)

AlpacaEval: a list of {instruction, dataset, ...} -> model_outputs.json, a list of {instruction, output, generator,
dataset}. FastChat: question.jsonl, {question_id, category, turns} -> model_answer/NAME.jsonl, {question_id, answer_id,
model_id, choices: [{index, turns}], tstamp}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ochat.data import records
from ochat.data.records import Record
from ochat.errors import DataError
from ochat.files import atomic
from ochat.text.conversation import text_field

Format = Literal["alpaca_eval", "mt_bench", "vicuna_bench"]
# FastChat's own, by category; 0.7 for any other
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)
MAX_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "vicuna_bench": 1024}


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn; each turn is asked with the answers to those before."""

    key: str  # by which it is told from the others of its file
    place: str  # file:line
    turns: tuple[str, ...]
    temperature: float
    record: Mapping[str, Any]  # as it was read


@dataclass(frozen=True)
class Answer:
    """An answer to each turn."""

    turns: tuple[str, ...]
    is_cut: bool  # one of them ended for want of room
    time_s: float  # when, since 1970

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads back."""
        return {"turns": list(self.turns), "is_cut": self.is_cut, "time_s": self.time_s}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Answer:
        """Raises: DataError for a line that is none."""
        try:
            return cls(tuple(map(str, line["turns"])), bool(line["is_cut"]), float(line["time_s"]))
        except (LookupError, TypeError, ValueError):
            raise DataError(f"a kept answer has other fields than turns, is_cut and time_s: {list(line)}") from None


def read(path: Path, form: Format, limit: int | None = None) -> list[Question]:
    """The questions in order, the first `limit` of them. Raises: DataError naming file, line and field."""
    found: list[Question] = []
    for record in records.read(path):
        if limit is not None and len(found) == limit:
            break
        value = record.value()
        try:
            found.append(_of_alpaca(record, value) if form == "alpaca_eval" else _of_fastchat(record, value))
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
    seen: set[str] = set()
    for question in found:
        if question.key in seen:
            raise DataError(f"{question.place}: question_id {question.key} is there twice; give each its own")
        seen.add(question.key)
    return found


def write(path: Path, form: Format, answered: Sequence[tuple[Question, Answer]], name: str) -> None:
    """The answers under the name `name`, in order; the file appears whole. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "alpaca_eval":
        outputs = [_model_output(question, answer, name) for question, answer in answered]
        atomic.write_text(path, json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
    else:
        lines = (json.dumps(_model_answer(*each, name), ensure_ascii=False) + "\n" for each in answered)
        atomic.write_text(path, "".join(lines))


def _of_alpaca(record: Record, value: dict[str, Any]) -> Question:
    instruction = text_field(value, "instruction", "instruction", required=True)
    return Question(str(record.number), record.place, (instruction,), 0.0, value)


def _of_fastchat(record: Record, value: dict[str, Any]) -> Question:
    turns = value.get("turns")
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise DataError("turns: expected a list of texts, at least one")
    key = value.get("question_id")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise DataError("question_id: expected a number or a text")
    given = value.get("required_temperature", TEMPERATURES.get(str(value.get("category")), 0.7))
    if not isinstance(given, int | float) or not 0 <= given <= 100:
        raise DataError(f"required_temperature: expected a number from 0, got {given!r}")
    return Question(str(key), record.place, tuple(turns), float(given), value)


def _model_output(question: Question, answer: Answer, name: str) -> dict[str, Any]:
    fields = {"instruction": question.turns[0], "output": answer.turns[0], "generator": name}
    return fields | {key: question.record[key] for key in ("dataset", "datasplit") if key in question.record}


def _model_answer(question: Question, answer: Answer, name: str) -> dict[str, Any]:
    turns = list(answer.turns)
    number = hashlib.sha256(json.dumps([name, question.key, turns]).encode()).hexdigest()[:22]  # as long as FastChat's
    return {
        "question_id": question.record["question_id"],
        "answer_id": number,
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": answer.time_s,
    }
