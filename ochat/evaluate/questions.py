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

from ochat.data.readers import parse_records
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
    for record, (key, turns, own) in parse_records(path, _of_alpaca if form == "alpaca_eval" else _of_fastchat):
        if len(found) == limit:
            break
        key = str(record.number) if key is None else key
        if key in found:
            raise DataError(f"{record.location}: question_id {key} occurs twice; give each question its own")
        given = own if temperature is None else temperature
        found[key] = Question(key, record.location, turns, given, record.value())
    return list(found.values())


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
