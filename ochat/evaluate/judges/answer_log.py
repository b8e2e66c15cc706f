"""JSON lines that are paid for once: each stands in the file as soon as it is known, and a second start reads it back.

    with AnswerLog(Path("out.partial.jsonl"), {"model": "models/mine"}) as log:  log.found;  log.append("81", {"a": 1})
The first line says what the others are of; a file that was begun with something else is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ochat.errors import ConfigError, DataError

_BEGIN = b'{"about":'


class AnswerLog:
    """Lines with a `key` each; `found`: {key: its last line}, of this start and those before. Without a path they are
    kept in memory alone."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.found: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> AnswerLog:
        """Raises: ConfigError for a file of something else, or one that another process writes; DataError naming a
        damaged line; OSError."""
        if self.path is None:
            return self
        self._file = self.path.open("a+b")
        try:
            self._lock(self._file)
            self._read(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, key: str, line: dict[str, Any]) -> None:
        """Writes a line. Raises: OSError, such as of a full disk; a torn line is left out at the next start."""
        self._write({"key": key} | line)
        self.found[key] = line

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path}: another process is writing it; wait for it, or end it") from None

    def _read(self, file: BinaryIO) -> None:
        file.seek(0)
        content = file.read()
        lines = content.split(b"\n")
        if len(lines) > 1:
            self._compare(self._parsed(lines[0], 1))
        elif not (content.startswith(_BEGIN) or _BEGIN.startswith(content)):
            self._compare({})
        os.truncate(file.fileno(), len(content) - len(lines[-1]))  # the line that a killed process tore
        if len(lines) == 1:
            self._write({"about": self.about})
        for number, text in enumerate(lines[1:-1], start=2):
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
            raise ConfigError(f"{self.path}: is no file of this command, and is left alone; name another, or remove it")
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
