"""A file of JSON lines that a full disk holds up and never tears: what cannot be written waits for the next time.

metrics = LineFile(run_dir / "metrics.jsonl", warn);  metrics.append([{"step": 1}]);  metrics.settle()
read(run_dir / "eval.jsonl")    # of a run that may be at work, and of a file that nobody vouches for
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class LineFile:
    """Appends to `path`; `warn` hears of a disk that refuses, once until it takes the lines again."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = path, warn
        self._waiting, self._is_refused = b"", False

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes the lines after those that wait, or lets them wait too."""
        self._waiting += "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        try:
            self.settle()
        except OSError as error:
            if not self._is_refused:
                self.warn(
                    f"{self.path} cannot be written ({error.strerror}); its lines wait in memory for the next time"
                )
            self._is_refused = True

    def settle(self) -> None:
        """Writes what waits. Raises: OSError where it still cannot be written; the file is then as it was."""
        if not self._waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._waiting)
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)  # no torn line
            raise
        self._waiting, self._is_refused = b"", False


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines that say their step; nothing where there is no file. Raises: OSError."""
    content = path.read_bytes() if path.exists() else b""
    return [line for text in content.split(b"\n")[:-1] if (line := parse(text)) is not None]


def parse(text: bytes) -> dict[str, Any] | None:
    """A line as the object that it is; None for what is torn, is no object, or says no step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and number(line.get("step")) is not None else None


def number(value: Any) -> float | None:
    """A finite number as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None
