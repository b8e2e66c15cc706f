"""The benchmarks' files: questions as AlpacaEval, MT-bench and Vicuna-bench publish them, answers as their judges read
them, and answers kept until all are there.

    questions = read_questions(Path("question.jsonl"), "mt_bench");  questions[0].turns
    answers = answer(questions, Path("model_outputs.json"), "alpaca_eval", answerer.answers, about={}, name="mine")

AlpacaEval: a list of {instruction, dataset, ...}; model_outputs.json, a list of {instruction, output, generator,
dataset}. FastChat: question.jsonl with {question_id, category, turns}; model_answer/NAME.jsonl, {question_id,
answer_id, model_id, choices: [{index, turns}], tstamp}.

Answers are kept in OUTPUT.partial.jsonl: a second start asks only the questions that are missing. The file's first line
says how the answers are made; a file that was begun differently is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from ochat.console import bar
from ochat.data.readers import parse_records
from ochat.errors import ConfigError, DataError
from ochat.files import atomic, bounded_json
from ochat.run import layout
from ochat.text.fields import text_field

log = logging.getLogger(__name__)
_BEGIN = b'{"about":'
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


class Answer(msgspec.Struct, frozen=True):
    """An answer to each turn of a question; a line of the kept answers."""

    key: str  # of the question
    turns: tuple[str, ...]
    is_cut: bool  # max_new_tokens or the context ended one of them
    time_s: float  # seconds since 1970


def read_questions(
    path: Path, form: Format, *, limit: int | None = None, temperature: float | None = None
) -> list[Question]:
    """The first `limit` questions (None: all) in order, at `temperature` (None: the benchmark's own).

    Raises: DataError naming file, line and field.
    """
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
    return (layout.run_of(Path(model)) or Path(model).resolve()).name or model


def answer(
    questions: Sequence[Question],
    output: Path,
    form: Format,
    ask: Callable[[Sequence[Question]], Iterable[Answer]],
    *,
    about: Mapping[str, Any],
    name: str,
) -> list[Answer]:
    """The answers in the order of the questions, after `output` is written under the model's `name`.

    `about`: plain data that decides the answers; a file of answers that were kept for other data is refused.
    Raises: ConfigError and DataError for a file in the way; as `ask`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial.jsonl")
    with kept_answers(partial, about) as (kept, keep):
        missing = [question for question in questions if question.key not in kept]
        if len(missing) < len(questions):
            log.info("%d of %d questions were answered before", len(questions) - len(missing), len(questions))
        with bar("questions", len(missing)) as advance:
            for found in ask(missing):
                keep(found)
                advance(1)
        answers = [kept[question.key] for question in questions]
        atomic.write_text(output, _written(form, zip(questions, answers, strict=True), name))
        partial.unlink()
    return answers


@contextmanager
def kept_answers(path: Path, about: Mapping[str, Any]) -> Iterator[tuple[dict[str, Answer], Callable[[Answer], None]]]:
    """({key: its last answer}, of this start and earlier ones, and a function that keeps one more).

    Raises: ConfigError for a file of something else, or one that another process writes; DataError naming a damaged
    line; OSError, for example when the disk is full: the next start drops a torn line.
    """
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{path}: another process is writing it; wait for it, or end it") from None
        kept = _read_kept(file, path, msgspec.json.encode({"about": about}))

        def keep(found: Answer) -> None:
            _append(file, msgspec.json.encode(found))
            kept[found.key] = found

        yield kept, keep


def _read_kept(file: BinaryIO, path: Path, begin: bytes) -> dict[str, Answer]:
    """The answers of a file that begins with this line, or nearly so, or is given it now."""
    file.seek(0)
    content = file.read()
    *lines, torn = content.split(b"\n")  # a killed process may leave half a line
    if lines or not (content.startswith(_BEGIN) or _BEGIN.startswith(content)):
        _refuse_other(path, content.partition(b"\n")[0], json.loads(begin)["about"])
    os.truncate(file.fileno(), len(content) - len(torn))
    if not lines:
        _append(file, begin)
    kept = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            found = msgspec.json.decode(line, type=Answer)
        except msgspec.MsgspecError as error:
            raise DataError(f"{path}:{number}: not a kept answer ({error}); remove the line, or the file") from None
        kept[found.key] = found
    return kept


def _append(file: BinaryIO, line: bytes) -> None:
    file.write(line + b"\n")
    file.flush()


def _refuse_other(path: Path, line: bytes, asked: dict[str, Any]) -> None:
    """Raises: ConfigError where a file's first line says that it holds something else."""
    try:
        begun = msgspec.json.decode(line, type=dict[str, dict[str, Any]])["about"]
    except (msgspec.MsgspecError, KeyError):
        raise ConfigError(f"{path}: not a file of kept answers; it is left alone. Name another, or remove it") from None
    for name in sorted(begun.keys() | asked.keys()):
        was, now = (bounded_json.shown(each.get(name)) for each in (begun, asked))
        if begun.get(name) != asked.get(name):
            raise ConfigError(f"{path}: begun with {name} {was}, now it is {now}; start as before, or remove the file")


def _written(form: Format, answered: Iterable[tuple[Question, Answer]], name: str) -> str:
    """The answers of the model `name`, as the judges read them."""
    if form == "alpaca_eval":
        return json.dumps([_model_output(*each, name) for each in answered], indent=2, ensure_ascii=False) + "\n"
    return "".join(json.dumps(_model_answer(*each, name), ensure_ascii=False) + "\n" for each in answered)


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
