"""`ochat answer MODEL QUESTIONS OUTPUT --format F`: a model's answers, as AlpacaEval's and FastChat's judges read them.

ochat answer models/mine alpaca_eval.json results/mine/model_outputs.json --format alpaca_eval --condition GPT4
ochat answer mine question.jsonl model_answer/mine.jsonl --format mt_bench --endpoint http://127.0.0.1:8000/v1

Answers lie in OUTPUT.partial.jsonl until all are there: a second start asks only for those that are missing.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ochat.console import bar
from ochat.errors import ConfigError
from ochat.evaluate.judges import questions as benchmark
from ochat.evaluate.judges.answer_log import AnswerLog
from ochat.evaluate.judges.asked_model import AskedModel, AskedOptions, asked_model
from ochat.evaluate.judges.questions import Answer, Format, Question
from ochat.files import atomic


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(AskedOptions):
    """Answers a benchmark's questions, for its own judge to read."""

    questions: Path  # alpaca_eval.json, or FastChat's question.jsonl, as published
    output: Path  # the file to write: model_outputs.json, or model_answer/NAME.jsonl
    format: Format = "alpaca_eval"  # whose questions and answers these are
    name: str = ""  # of the model in the answers; empty: OUTPUT's, in alpaca_eval the model's
    max_new_tokens: int | None = None  # the longest answer to a turn; left out: 2048 in alpaca_eval, else 1024
    temperature: float | None = None  # left out: 0 in alpaca_eval, else FastChat's for the question's category
    limit: int | None = None  # answer the first so many questions; left out: all


def main(options: AnswerOptions) -> None:
    """The command `ochat answer`."""
    answered = answer(options)
    cut = sum(each.is_cut for _, each in answered)
    most = f"{cut:,} of them cut short by --max-new-tokens or the context" if cut else "none of them cut short"
    Console(highlight=False).print(
        f"{len(answered):,} answers in {escape(str(options.output))}, {most}", soft_wrap=True
    )


def answer(options: AnswerOptions) -> list[tuple[Question, Answer]]:
    """The questions and their answers, in order, after OUTPUT is written.

    Raises: ConfigError, DataError and CheckpointError for what can be known before anything is asked; ServerError.
    """
    check_output(options.output)
    asked = read_questions(options)
    given = options.max_new_tokens
    most = benchmark.MAX_NEW_TOKENS[options.format] if given is None else given
    model = asked_model(options, most, warn)
    about = {"questions": atomic.sha256(options.questions), "format": options.format, "seed": options.seed}
    about |= {"max_new_tokens": most, "temperature": options.temperature} | model.about
    options.output.parent.mkdir(parents=True, exist_ok=True)
    partial = options.output.with_name(f"{options.output.name}.partial.jsonl")
    with AnswerLog(partial, about) as log:
        answered = ask(model, asked, log)
        benchmark.write(options.output, options.format, answered, _name(options))
        partial.unlink()
    return answered


def ask(model: AskedModel, asked: list[Question], log: AnswerLog) -> list[tuple[Question, Answer]]:
    """Each question with its answer, in order; those that the log holds are not asked. Raises: as `answers`."""
    missing = [question for question in asked if question.key not in log.found]
    if done := len(asked) - len(missing):
        Console(stderr=True, highlight=False).print(f"{done:,} of {len(asked):,} were answered before")
    with bar("questions", len(missing)) as advance:
        for question, found in model.answers(missing):
            log.append(question.key, found.to_dict())
            advance(1)
    return [(question, Answer.from_dict(log.found[question.key])) for question in asked]


def read_questions(options: AnswerOptions) -> list[Question]:
    """The questions, with the temperature that is asked for. Raises: ConfigError, DataError."""
    check_limit(options.limit)
    asked = benchmark.read(options.questions, options.format, options.limit)
    if options.temperature is None:
        return asked
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise ConfigError(f"--temperature {options.temperature}: 0 or more is needed")
    return [dataclasses.replace(question, temperature=options.temperature) for question in asked]


def check_limit(limit: int | None) -> None:
    """Raises: ConfigError for less than 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit}: at least 1 question is needed")


def check_output(path: Path) -> None:
    """Raises: ConfigError where a new file cannot be."""
    if path.exists():
        what = "is a folder; name a file" if path.is_dir() else "exists; remove it, or name another file"
        raise ConfigError(f"{path}: {what}")


def warn(message: str) -> None:
    """Says on stderr what is waited out."""
    Console(stderr=True, highlight=False).print(f"[bold yellow]warning[/]: {escape(message)}", soft_wrap=True)


def _name(options: AnswerOptions) -> str:
    if options.name:
        return options.name
    if options.format != "alpaca_eval":
        return options.output.stem
    folder = Path(options.model).resolve()
    if folder.name == "export" and (folder.parent / "config.toml").is_file():  # of a run, whose name tells more
        folder = folder.parent
    return folder.name or options.model
