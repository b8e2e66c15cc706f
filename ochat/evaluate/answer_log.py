"""Append answers to a file as they arrive, and read them back at the next start.

    with AnswerLog(Path("out.partial.jsonl"), {"model": "models/mine"}) as log:  log.found;  log.append("81", {"a": 1})

The first line says how the answers are made. A file that was begun differently is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ochat.errors import ConfigError, DataError

_BEGIN = b'{"about":'


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
