"""Answers and the files that the benchmarks' own judges read.

    write_answers(Path("model_outputs.json"), "alpaca_eval", [(question, answer), ...], "mine")

AlpacaEval: model_outputs.json, a list of {instruction, output, generator, dataset}. FastChat: model_answer/NAME.jsonl,
{question_id, answer_id, model_id, choices: [{index, turns}], tstamp}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, DataError
from ochat.evaluate.questions import Format, Question
from ochat.files import atomic
from ochat.run import layout


@dataclass(frozen=True)
class Answer:
    """An answer to each turn of a question."""

    turns: tuple[str, ...]
    is_cut: bool  # max_new_tokens or the context ended one of them
    time_s: float  # seconds since 1970

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back."""
        return {"turns": list(self.turns), "is_cut": self.is_cut, "time_s": self.time_s}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> Answer:
        """Raises: DataError for missing or ill-typed fields."""
        try:
            return cls(tuple(map(str, line["turns"])), bool(line["is_cut"]), float(line["time_s"]))
        except (LookupError, TypeError, ValueError):
            raise DataError(f"a kept answer needs the fields turns, is_cut and time_s, got {list(line)}") from None


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
