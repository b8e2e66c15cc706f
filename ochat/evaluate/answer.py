"""Answer a benchmark's questions with any model, and resume where an earlier start ended.

    answered = answer(answerer, questions, Path("model_outputs.json"), "alpaca_eval", about={}, name="mine")

Answers are kept in OUTPUT.partial.jsonl until all are there: a second start asks only the questions that are missing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ochat.console import bar
from ochat.evaluate.answer_files import Answer, check_output, write_answers
from ochat.evaluate.answer_log import AnswerLog
from ochat.evaluate.model_client import Answerer
from ochat.evaluate.questions import Format, Question

log = logging.getLogger(__name__)


def answer(
    answerer: Answerer,
    questions: Sequence[Question],
    output: Path,
    form: Format,
    *,
    about: Mapping[str, Any],
    name: str,
) -> list[tuple[Question, Answer]]:
    """The questions with their answers, in order, after `output` is written under the model's `name`.

    `about`: plain data that, with the answerer's own, decides the answers; a partial file of other data is refused.
    Raises: ConfigError and DataError for a file in the way; as answerer.answers.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial.jsonl")
    with AnswerLog(partial, {**about, **answerer.about}) as kept:
        missing = [question for question in questions if question.key not in kept.found]
        if len(missing) < len(questions):
            log.info("%d of %d questions were answered before", len(questions) - len(missing), len(questions))
        with bar("questions", len(missing)) as advance:
            for question, found in answerer.answers(missing):
                kept.append(question.key, found.to_dict())
                advance(1)
        answered = [(question, Answer.from_dict(kept.found[question.key])) for question in questions]
        write_answers(output, form, answered, name)
        partial.unlink()
    return answered
