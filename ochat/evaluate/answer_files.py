"""The benchmarks' files: questions as AlpacaEval, MT-bench and Vicuna-bench publish them, answers as their judges read
them.

    questions = read_questions(Path("question.jsonl"), "mt_bench");  questions[0].turns
    write_answers(Path("model_outputs.json"), "alpaca_eval", [(question, answer), ...], "mine")

AlpacaEval: a list of {instruction, dataset, ...}; model_outputs.json, a list of {instruction, output, generator,
dataset}. FastChat: question.jsonl with {question_id, category, turns}; model_answer/NAME.jsonl, {question_id,
answer_id, model_id, choices: [{index, turns}], tstamp}.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ochat.data.readers import parse_records
from ochat.errors import ConfigError, DataError
from ochat.files import atomic
from ochat.run import layout
from ochat.text.conversation import text_field

Format = Literal["alpaca_eval", "mt_bench", "vicuna_bench"]
# FastChat's own temperatures by category; 0.7 for any other
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning"), 0.0
)


@dataclass(frozen=True)
class Question:
    """What a user says, turn by turn. Each turn is asked together with the earlier turns and their answers."""

    key: str  # unique in its file
    place: str  # file:line
    turns: tuple[str, ...]
    temperature: float
    record: Mapping[str, Any]  # as it was read


@dataclass(frozen=True)
class Answer:
    """An answer to each turn of a question."""

    turns: tuple[str, ...]
    is_cut: bool  # max_new_tokens or the context ended one of them
    time_s: float  # seconds since 1970

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Answer:
        """Raises: DataError for missing or ill-typed fields."""
        try:
            return cls(tuple(map(str, line["turns"])), bool(line["is_cut"]), float(line["time_s"]))
        except (LookupError, TypeError, ValueError):
            raise DataError(f"a kept answer needs the fields turns, is_cut and time_s, got {list(line)}") from None


def read_questions(
    path: Path, form: Format, *, limit: int | None = None, temperature: float | None = None
) -> list[Question]:
    """The first `limit` questions (None: all) in order, at `temperature` (None: the benchmark's own).

    Raises: ConfigError for a limit or temperature out of range; DataError naming file, line and field.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 question is needed")
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"--temperature {temperature}: 0 or more is needed")
    found: dict[str, Question] = {}
    for record, (key, turns, own) in parse_records(path, _of_alpaca if form == "alpaca_eval" else _of_fastchat):
        if len(found) == limit:
            break
        key = str(record.number) if key is None else key
        if key in found:
            raise DataError(f"{record.location}: question_id {key} occurs twice; give each question its own")
        given = own if temperature is None else temperature
        found[key] = Question(key, record.location, turns, given, record.value())
    return list(found.values())


def check_output(path: Path) -> None:
    """Raises: ConfigError if `path` exists already."""
    if path.exists():
        what = "is a folder; name a file" if path.is_dir() else "exists; remove it, or name another file"
        raise ConfigError(f"{path}: {what}")


def generator_name(form: Format, model: str, output: Path) -> str:
    """The model's name in the answers: FastChat takes it from the file's name, AlpacaEval gets the model's folder, or
    the run's for RUN/export."""
    if form != "alpaca_eval":
        return output.stem
    folder = Path(model).resolve()
    if folder.name == layout.EXPORT and (folder.parent / layout.CONFIG).is_file():
        folder = folder.parent
    return folder.name or model


def write_answers(path: Path, form: Format, answered: Sequence[tuple[Question, Answer]], name: str) -> None:
    """Write the answers of the model `name`, in order, in one atomic write. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "alpaca_eval":
        outputs = [_model_output(question, answer, name) for question, answer in answered]
        atomic.write_text(path, json.dumps(outputs, indent=2, ensure_ascii=False) + "\n")
    else:
        lines = (json.dumps(_model_answer(*each, name), ensure_ascii=False) + "\n" for each in answered)
        atomic.write_text(path, "".join(lines))


def _of_alpaca(value: dict[str, Any]) -> tuple[str | None, tuple[str, ...], float]:
    """(key, turns, temperature) of a record; None: the record's number is its key."""
    return None, (text_field(value, "instruction", "instruction", required=True),), 0.0


def _of_fastchat(value: dict[str, Any]) -> tuple[str | None, tuple[str, ...], float]:
    turns, key = value.get("turns"), value.get("question_id")
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise DataError("turns: expected a list of texts, at least one")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise DataError("question_id: expected a number or a text")
    given = value.get("required_temperature", TEMPERATURES.get(str(value.get("category")), 0.7))
    if not isinstance(given, int | float) or not 0 <= given <= 100:
        raise DataError(f"required_temperature: expected a number from 0, got {given!r}")
    return str(key), tuple(turns), float(given)


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
