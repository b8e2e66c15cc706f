"""Read the published questions of AlpacaEval, MT-bench and Vicuna-bench.

    questions = read_questions(Path("question.jsonl"), "mt_bench");  questions[0].turns

AlpacaEval: a list of {instruction, dataset, ...}. FastChat's benchmarks: question.jsonl with
{question_id, category, turns}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ochat.data import records
from ochat.errors import ConfigError, DataError
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
    for record in records.read(path):
        if len(found) == limit:
            break
        value = record.value()
        try:
            if form == "alpaca_eval":
                key, turns, own = str(record.number), _instruction(value), 0.0
            else:
                key, turns, own = _question_id(value), _turns(value), _temperature(value)
            if key in found:
                raise DataError(f"question_id {key} occurs twice; give each question its own")
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
        found[key] = Question(key, record.place, turns, own if temperature is None else temperature, value)
    return list(found.values())


def _instruction(value: dict[str, Any]) -> tuple[str, ...]:
    return (text_field(value, "instruction", "instruction", required=True),)


def _turns(value: dict[str, Any]) -> tuple[str, ...]:
    turns = value.get("turns")
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise DataError("turns: expected a list of texts, at least one")
    return tuple(turns)


def _question_id(value: dict[str, Any]) -> str:
    key = value.get("question_id")
    if not isinstance(key, int | str) or isinstance(key, bool):
        raise DataError("question_id: expected a number or a text")
    return str(key)


def _temperature(value: dict[str, Any]) -> float:
    given = value.get("required_temperature", TEMPERATURES.get(str(value.get("category")), 0.7))
    if not isinstance(given, int | float) or not 0 <= given <= 100:
        raise DataError(f"required_temperature: expected a number from 0, got {given!r}")
    return float(given)
