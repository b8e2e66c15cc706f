"""`ochat agieval MODEL FOLDER`: AGIEval's zero-shot multiple choice, answered and scored.

ochat agieval models/mine AGIEval/data/v1_1 --condition GPT4 --output agieval.json
ochat agieval mine AGIEval/data/v1_1/sat-en.jsonl --endpoint http://127.0.0.1:8000/v1 --answers sat-en.answers.jsonl

The accuracy is by the letter as AGIEval reads it, so that it stands beside published numbers; the one beside it counts
only answers that commit themselves to the letter. An answer without a letter is wrong, and is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.evaluate import proportion
from ochat.evaluate.judges import agieval_task
from ochat.evaluate.judges.agieval_task import Task
from ochat.evaluate.judges.answer import ask, check_limit, warn
from ochat.evaluate.judges.answer_log import AnswerLog
from ochat.evaluate.judges.asked_model import AskedOptions, asked_model
from ochat.files import atomic


@dataclass(frozen=True, kw_only=True)
class AgievalOptions(AskedOptions):
    """Answers and scores AGIEval's multiple-choice questions."""

    data: Path  # AGIEval's folder data/v1_1, or one of its files
    # by their files' names; left out: aqua-rat, logiqa-en, lsat-ar, lsat-lr, lsat-rc, sat-en and sat-math
    tasks: tuple[str, ...] = ()
    max_new_tokens: int = 256  # the longest answer, in tokens
    limit: int | None = None  # answer the first so many questions of each task; left out: all
    output: Path | None = None  # write the numbers to this JSON file too
    answers: Path | None = None  # keep the answers in this JSON Lines file; a second start asks only what is missing


def main(options: AgievalOptions) -> None:
    """The command `ochat agieval`."""
    Console(highlight=False).print(table(evaluate(options)))


def evaluate(options: AgievalOptions) -> dict[str, Any]:
    """What --output holds, after it is written: the model, `tasks` {name: numbers} and their `average`.

    Raises: ConfigError, DataError and CheckpointError for what can be known before anything is asked; ServerError.
    """
    check_limit(options.limit)
    atomic.check_places(options.output, options.answers)
    tasks = [agieval_task.read(path, options.limit) for path in agieval_task.find(options.data, options.tasks)]
    model = asked_model(options, options.max_new_tokens, warn)
    about = {"tasks": {task.name: len(task.questions) for task in tasks}, "max_new_tokens": options.max_new_tokens}
    about |= {"questions": _digest(tasks)} | model.about
    with AnswerLog(options.answers, about) as log:
        answered = ask(model, [question for task in tasks for question in task.questions], log)
    texts = {question.key: answer.turns[0] for question, answer in answered}
    record = {"model": options.model, "condition": model.about["condition"], "data": str(options.data)}
    record |= {"interval": {"level": proportion.LEVEL, "method": proportion.METHOD}}
    record |= summarise(tasks, texts)
    if options.output:
        atomic.write_json(options.output, record)
    return record


def summarise(tasks: Sequence[Task], texts: Mapping[str, str]) -> dict[str, Any]:
    """`tasks` {name: {questions, correct, accuracy, interval, no_letter, strict_accuracy, strict_no_letter}} and
    `average` over them; `texts`: the answer to each question's key."""
    scored = {task.name: _score(task, texts) for task in tasks}
    shares = [row["accuracy"] for row in scored.values()]
    mean, ends = proportion.average(shares, [row["interval"] for row in scored.values()])
    strict = sum(row["strict_accuracy"] for row in scored.values()) / len(scored)
    return {"tasks": scored, "average": {"accuracy": mean, "interval": ends, "strict_accuracy": strict}}


def table(record: Mapping[str, Any]) -> Table:
    """A row for each task, and one for their average."""
    level = record["interval"]["level"]
    whole = "" if set(record["tasks"]) == set(agieval_task.PAPER) else "; not the paper's 7 tasks"
    strict = f"strict: where the answer commits itself to a letter{whole}"
    shown = Table(
        title="AGIEval, zero-shot, per cent right",
        caption=escape(f"[low, high]: {level:.0%}, {record['interval']['method']}; {strict}"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("task", overflow="fold")
    for heading in ("questions", "right", f"{level:.0%}", "no letter", "strict", "no letter"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in record["tasks"].items():
        count = [f"{row[key]:,}" for key in ("questions", "no_letter", "strict_no_letter")]
        shown.add_row(name, count[0], *_percent(row), count[1], f"{100 * row['strict_accuracy']:.1f}", count[2])
    average, number = record["average"], len(record["tasks"])
    shown.add_section()
    strict = f"{100 * average['strict_accuracy']:.1f}"
    shown.add_row(f"average of {number}", "", *_percent(average), "", strict, "")
    return shown


def _score(task: Task, texts: Mapping[str, str]) -> dict[str, Any]:
    answers = [texts[question.key] for question in task.questions]
    letters = [agieval_task.published(text) for text in answers]
    strict = [agieval_task.strict(text, most) for text, most in zip(answers, task.num_options, strict=True)]
    correct, strictly = (sum(map(str.__eq__, task.labels, map(str, read))) for read in (letters, strict))
    count = len(answers)
    return {
        "questions": count,
        "correct": correct,
        "accuracy": correct / count,
        "interval": proportion.wilson(correct / count, count),
        "no_letter": letters.count(None),
        "strict_accuracy": strictly / count,
        "strict_no_letter": strict.count(None),
    }


def _percent(row: Mapping[str, Any]) -> tuple[str, str]:
    low, high = row["interval"]
    return f"{100 * row['accuracy']:.1f}", escape(f"[{100 * low:.1f}, {100 * high:.1f}]")


def _digest(tasks: Sequence[Task]) -> str:
    prompts = "\0".join(question.turns[0] for task in tasks for question in task.questions)
    return hashlib.sha256(prompts.encode()).hexdigest()[:16]
