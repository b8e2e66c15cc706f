"""Append JSON lines. If the disk is full, keep them in memory and retry; never leave half a line.

metrics = JsonlWriter(run_dir / "metrics.jsonl");  metrics.append([{"step": 1}]);  metrics.flush()
read_lines(run_dir / "metrics.jsonl")    # of a run that may be writing, or of an untrusted file
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends to `path`; warns once when the disk refuses lines, until it takes them again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting, self._is_refused = b"", False

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write the lines after those that wait; on an error let them wait too."""
        self._waiting += "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            self.flush()
        except OSError as error:
            if not self._is_refused:
                what = "%s cannot be written (%s); its lines wait in memory for the next time"
                log.warning(what, self.path, error.strerror)
            self._is_refused = True

    def flush(self) -> None:
        """Write the lines that wait. Raises: OSError where they still cannot be written; the file is then unchanged."""
        if not self._waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)  # no half line
            raise
        self._waiting, self._is_refused = b"", False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines that have a step; empty where there is no file. Raises: OSError."""
    content = path.read_bytes() if path.exists() else b""
    return [line for text in content.split(b"\n")[:-1] if (line := parse_line(text)) is not None]


def has_step(path: Path, step: int) -> bool:
    """Whether a line is of this step."""
    return any(line["step"] == step for line in read_lines(path))


def parse_line(text: bytes) -> dict[str, Any] | None:
    """A line as an object; None for what is torn, is no object, or has no step."""
    try:
        line = json.loads(text.decode())  # of bytes, json guesses the encoding
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and finite_number(line.get("step")) is not None else None


def finite_number(value: Any) -> float | None:
    """A finite number as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None
