"""Answer a benchmark's questions with any model, and resume where an earlier start ended.

    answered = answer(answerer, questions, Path("model_outputs.json"), "alpaca_eval", about={}, name="mine")

Answers are kept in OUTPUT.partial.jsonl until all are there: a second start asks only the questions that are missing.
The file's first line says how the answers are made; a file that was begun differently is refused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ochat.console import bar
from ochat.errors import ConfigError, DataError
from ochat.evaluate.answer_files import Answer, Format, Question, check_output, write_answers
from ochat.evaluate.model_client import Answerer

log = logging.getLogger(__name__)
_BEGIN = b'{"about":'


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


class AnswerLog:
    """Lines with a `key` each. `found`: {key: its last line}, of this start and earlier ones."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.found: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> AnswerLog:
        """Raises: ConfigError for a file of something else, or one that another process writes; DataError naming a
        damaged line; OSError."""
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{self.path}: another process is writing it; wait for it, or end it") from None
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, key: str, line: dict[str, Any]) -> None:
        """Write a line. Raises: OSError, for example when the disk is full; the next start drops a torn line."""
        self._write({"key": key} | line)
        self.found[key] = line

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        *lines, torn = content.split(b"\n")  # a killed process may leave half a line
        if lines:
            self._compare(self._parsed(lines[0], 1))
        elif not (content.startswith(_BEGIN) or _BEGIN.startswith(content)):
            self._compare({})
        os.truncate(self._file.fileno(), len(content) - len(torn))
        if not lines:
            self._write({"about": self.about})
        for number, text in enumerate(lines[1:], start=2):
            line = self._parsed(text, number)
            self.found[str(line.pop("key", ""))] = line

    def _parsed(self, text: bytes, number: int) -> dict[str, Any]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}:{number}: not JSON ({error}); remove the line, or the file") from None
        if not isinstance(line, dict):
            raise DataError(f"{self.path}:{number}: not an object; remove the line, or the file")
        return line

    def _compare(self, line: dict[str, Any]) -> None:
        begun = line.get("about")
        if not isinstance(begun, dict):
            raise ConfigError(f"{self.path}: not a file of kept answers; it is left alone. Name another, or remove it")
        asked = json.loads(json.dumps(self.about))
        for name in sorted(begun.keys() | asked.keys()):
            if begun.get(name) != asked.get(name):
                raise ConfigError(
                    f"{self.path}: begun with {name} {_short(begun.get(name))}, now it is {_short(asked.get(name))}; "
                    "start as before, or remove the file"
                )


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."
