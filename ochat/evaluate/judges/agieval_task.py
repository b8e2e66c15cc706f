"""AGIEval's multiple choice: records as published (v1_1 and v1), its zero-shot prompt, and letters read from answers.

    task = read(Path("AGIEval/data/v1_1/aqua-rat.jsonl"));  task.questions[0].turns;  published("B. Because ...")

A record: {"passage": text or null, "question", "options": ["(A)...", ...], "label": "C", ...}. A chat model is given
the whole prompt, which ends in "the answer is", as what its user says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.data import records
from ochat.errors import ConfigError, DataError
from ochat.evaluate.judges.questions import Question
from ochat.text.conversation import text_field

PAPER = ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math")  # OpenChat's table
ENGLISH = (*PAPER, "sat-en-without-passage", "gaokao-english")
CHINESE = ("logiqa-zh",) + tuple(
    f"gaokao-{subject}" for subject in ("chinese", "geography", "history", "biology", "chemistry", "mathqa")
)
# passage, question, options, the last letter
PROMPTS = dict.fromkeys(ENGLISH, "{}Q: {} Answer Choices: {}\nA: Among A through {}, the answer is") | dict.fromkeys(
    CHINESE, "{}问题：{} 选项：{}\n答案：从A到{}, 我们应选择"
)
LETTERS = "ABCDEFG"


@dataclass(frozen=True)
class Task:
    """A task's questions, and for each its right letter and how many letters there are."""

    name: str
    questions: list[Question]
    labels: list[str]
    num_options: list[int]


def find(data: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the tasks named, in this order; without names the paper's tasks that are there, or the one file.

    Raises: ConfigError naming a task that is not there, or that is not of one letter.
    """
    for name in names:
        if name not in PROMPTS:
            raise ConfigError(f"--tasks {name}: not one that is scored here; known: {', '.join(PROMPTS)}")
    if data.is_file():
        return [data]
    found = [data / f"{name}.jsonl" for name in dict.fromkeys(names or PAPER)]
    missing = [path for path in found if not path.is_file()]
    if missing and (names or len(missing) == len(found)):
        raise ConfigError(f"{missing[0]}: no such file; give AGIEval's folder data/v1_1, or one of its files")
    return [path for path in found if path not in missing]


def read(path: Path, limit: int | None = None) -> Task:
    """The first `limit` questions of a file, whose name is the task's. Raises: DataError naming line and field."""
    task = Task(path.stem, [], [], [])
    if task.name not in PROMPTS:
        raise DataError(
            f"{path}: {task.name} is no task that is scored here, by one right letter; known: {', '.join(PROMPTS)}"
        )
    for record in records.read(path):
        if limit is not None and len(task.questions) == limit:
            break
        value = record.value()
        try:
            prompt, label, count = _prompt(task.name, value)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from None
        task.questions.append(Question(f"{task.name}/{record.number}", record.place, (prompt,), 0.0, value))
        task.labels.append(label)
        task.num_options.append(count)
    return task


def _prompt(task: str, value: dict[str, Any]) -> tuple[str, str, int]:
    """(prompt, right letter, number of letters) of a record."""
    options, passage = value.get("options"), value.get("passage") or ""
    if not (isinstance(options, list) and options and all(isinstance(option, str) for option in options)):
        raise DataError("options: expected a list of texts, at least one")
    if not isinstance(passage, str):
        raise DataError("passage: expected text or null")
    # some records hold all options in one text; their number is then the one that AGIEval takes
    count = len(options) if len(options) > 1 else 5 if task in ENGLISH else 4
    if count > len(LETTERS):
        raise DataError(f"options: {count} of them, but there are letters for {len(LETTERS)}")
    label = value.get("label")
    if not (isinstance(label, str) and len(label) == 1 and label in LETTERS[:count]):
        raise DataError(f"label: expected one letter from A to {LETTERS[count - 1]}")
    question = text_field(value, "question", "question", required=True)
    return PROMPTS[task].format(passage, question, " ".join(options), LETTERS[count - 1]), label, count


def published(text: str) -> str | None:
    """The letter as AGIEval and OpenChat's own evaluation read it: the first capital from A to F, whatever word it
    begins. "Because it is C" is B."""
    return next((char for char in text if char in "ABCDEF"), None)


_OPEN = r"[\s*_$({\[（\"'`]*"
_SAID = re.compile(
    r"(?:answer\s*(?:is|should be|would be|[:：])|答案\s*(?:是|为|应为|[:：])|选择?)\s*[:：]?\s*(?:option|choice)?"
    + _OPEN
    + r"(?:\\(?:boxed|text|mathbf)\{)*([A-G])(?![\w'’])(?!\W*(?:or|and|/|或|和)\W*[A-G]\b)",
    re.IGNORECASE,
)
_LEADING = re.compile(_OPEN + r"([A-G])(?:[\s*_$)}\]）\"'`]*$|[*_$]*[).:,，。、：）\]}\n]|(?<=[B-G])\s)")
_BRACKETED = re.compile(r"[(（\[]([A-G])[)）\]]")


def strict(text: str, num_options: int) -> str | None:
    """The letter that an answer commits itself to: the last "answer is C" it says; else the letter that it begins with
    ("C", "(C) ...", "C. ..."); else the only one in brackets. None: it does not, or the letter is no option's."""
    said = [letter for letter in _SAID.findall(text) if letter.isupper()]
    if said:
        letter = said[-1]
    elif leading := _LEADING.match(text):
        letter = leading[1]
    else:
        bracketed = set(_BRACKETED.findall(text))
        letter = bracketed.pop() if len(bracketed) == 1 else None
    return letter if letter is not None and letter in LETTERS[:num_options] else None
