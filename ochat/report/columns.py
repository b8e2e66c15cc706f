"""The numbers of metrics.jsonl as columns, read on from where the last look ended: a live run has a line a step.

    columns = Columns(run_dir / "metrics.jsonl");  columns.refresh()
    columns["loss"], columns["classes", "GPT4", "loss"]      # (n,) float64, NaN where a line has no number

A half-written last line waits for its end; a file that was cut and written anew (a resumed run) is read anew.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.train.line_file import number, parse

Name = str | tuple[str, ...]


class Columns:
    """Columns by name, those of a class by ("classes", class, key). Costs: 8 bytes a number; 10 us a new line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start()

    def _start(self) -> None:
        self.num_lines, self.num_unreadable = 0, 0
        self._values: dict[Name, array[float]] = {}
        self._inode, self._read = 0, 0

    def refresh(self) -> None:
        """Adds the whole lines that came since. Raises: OSError for a file that is there and cannot be read."""
        if not self.path.exists():
            return self._start()
        with self.path.open("rb") as file:
            state = self.path.stat()
            if state.st_ino != self._inode or state.st_size < self._read:
                self._start()
            self._inode = state.st_ino
            file.seek(self._read)
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._read += len(text)
                self._add(text)

    def __getitem__(self, name: Name) -> NDArray[np.float64]:
        """(n,); all NaN for a name that no line has."""
        if name not in self._values:
            return np.full(self.num_lines, np.nan)
        return np.array(self._values[name])

    def classes(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(name[1] for name in self._values if isinstance(name, tuple)))

    def _add(self, text: bytes) -> None:
        line = parse(text)
        if line is None:
            self.num_unreadable += bool(text.strip())
            return
        for name, value in _numbers(line):
            column = self._values.setdefault(name, array("d"))
            column.extend([math.nan] * (self.num_lines - len(column)))
            column.append(value)
        self.num_lines += 1
        for column in self._values.values():
            if len(column) < self.num_lines:
                column.append(math.nan)


def _numbers(line: dict[str, Any]) -> Iterator[tuple[Name, float]]:
    for key, value in line.items():
        if (found := number(value)) is not None:
            yield key, found
    classes = line.get("classes")
    for name, row in classes.items() if isinstance(classes, dict) else ():
        for key, value in row.items() if isinstance(row, dict) else ():
            if (found := number(value)) is not None:
                yield ("classes", name, key), found
