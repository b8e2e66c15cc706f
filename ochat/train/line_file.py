"""A file of JSON lines that a full disk holds up and never tears: what cannot be written waits for the next time.

metrics = LineFile(run_dir / "metrics.jsonl", warn);  metrics.append([{"step": 1}]);  metrics.settle()
"""

from __future__ import annotations

import json
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
