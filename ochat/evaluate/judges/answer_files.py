"""Two models' answers to the same questions, as pairs: from model_outputs.json (AlpacaEval) or model_answer/*.jsonl
(FastChat), told apart by what is in them.

    pairs = read_pairs(Path("a.json"), Path("b.json"));  pairs[0].answers_a

FastChat's files do not hold the questions: they are read from question.jsonl.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.data import records
from ochat.errors import ConfigError, DataError
from ochat.evaluate.judges import questions as benchmark
from ochat.evaluate.judges.questions import Question
from ochat.evaluate.judges.verdict import Pair
from ochat.text.conversation import text_field


@dataclass(frozen=True)
class AnswerFile:
    """Who answered, and each question's answers by its key; `instructions` where the file holds the questions."""

    path: Path
    name: str
    answers: dict[str, tuple[str, ...]]
    instructions: dict[str, str]


def read_pairs(a: Path, b: Path, questions: Path | None) -> tuple[list[Pair], str, str]:
    """The pairs in A's order, and the two names. Raises: DataError for files that do not answer the same questions;
    ConfigError where `questions` is missing."""
    ours, theirs = _read(a), _read(b)
    for one, other in ((ours, theirs), (theirs, ours)):
        if lacking := [key for key in one.answers if key not in other.answers]:
            raise DataError(
                f"{other.path}: has no answer to {len(lacking)} of the {len(one.answers)} questions that {one.path} "
                f"answers, the first is {lacking[0][:80]!r}; both must answer the same"
            )
    asked = _asked(ours, questions)
    pairs = []
    for key, answers in ours.answers.items():
        turns, reference = asked[key]
        if not len(turns) == len(answers) == len(theirs.answers[key]):
            raise DataError(f"{a}, {b}: question {key[:80]!r} has {len(turns)} turns, but not so many answers in each")
        pairs.append(Pair(key, turns, answers, theirs.answers[key], reference))
    return pairs, ours.name, theirs.name


def _read(path: Path) -> AnswerFile:
    file = AnswerFile(path, path.stem, {}, {})
    seen: Counter[str] = Counter()
    name = ""
    for record in records.read(path):
        value = record.value()
        try:
            if "choices" in value:
                key, answers, name = str(value.get("question_id")), _turns(value), str(value.get("model_id", ""))
            else:
                text = text_field(value, "instruction", "instruction", required=True)
                answers, name = (text_field(value, "output", "output", required=True),), str(value.get("generator", ""))
                seen[text] += 1  # an instruction that is there twice has two answers
                key = text if seen[text] == 1 else f"{text} #{seen[text]}"
                file.instructions[key] = text
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
        if key in file.answers:
            raise DataError(f"{record.place}: question {key[:80]!r} is answered twice")
        file.answers[key] = answers
    return AnswerFile(path, name or path.stem, file.answers, file.instructions)


def _turns(value: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        turns = value["choices"][0]["turns"]
    except (LookupError, TypeError):
        raise DataError("choices: expected a list of objects with `turns`") from None
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise DataError("choices[0].turns: expected a list of texts")
    return tuple(turns)


def _asked(file: AnswerFile, path: Path | None) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{key: (turns, reference answers)}."""
    if file.instructions:
        return {key: ((text,), ()) for key, text in file.instructions.items()}
    if path is None:
        raise ConfigError(f"{file.path}: holds answers without their questions; give --questions question.jsonl")
    found = {question.key: question for question in benchmark.read(path, "mt_bench")}
    for key in file.answers:
        if key not in found:
            raise DataError(f"{path}: has no question {key}, which {file.path} answers")
    return {key: (found[key].turns, _reference(found[key])) for key in file.answers}


def _reference(question: Question) -> tuple[str, ...]:
    """A question's right answers, which some have, one for each turn."""
    reference = question.record.get("reference")
    if not isinstance(reference, list) or not all(isinstance(text, str) for text in reference):
        return ()
    return tuple(reference)
