"""What becomes of bad records: the first one stops everything, or all go to a file with their reasons.

with Rejects(folder, "skip") as rejects: num_rejected += rejects.add(encoded.rejects)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ochat.data.encode import Reject
from ochat.errors import DataError

REJECTS = "rejects.jsonl"


class Rejects:
    """Bad records: the first one raises, or all are written down with their reasons."""

    def __init__(self, folder: Path, on_bad: str) -> None:
        self.path, self.stop = folder / REJECTS, on_bad == "error"
        self.file: IO[str] | None = None

    def __enter__(self) -> Rejects:
        self.file = None if self.stop else self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, rejects: Sequence[Reject]) -> int:
        """Number of `rejects`. Raises DataError for the first if none may be."""
        if rejects and self.file is None:
            first = rejects[0]
            raise DataError(f"{first.file}:{first.line}: {first.reason} (--on-bad skip goes on without bad records)")
        for reject in rejects:
            assert self.file is not None
            self.file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        return len(rejects)
