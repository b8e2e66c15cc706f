"""How a bad record is refused: reading and encoding raise DataError, `attempt` turns it into a Reject, and a RejectLog
stops at the first one or writes all to rejects.jsonl, as --on-bad says.

    item = attempt(record, encode, record)     # what encode(record) returns, or a Reject
    with RejectLog(folder, "skip") as log: log.add([item])
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ochat.data.readers import Record
from ochat.errors import DataError

REJECTS = "rejects.jsonl"
MAX_CHARACTERS = 2000
T = TypeVar("T")


class Reject(NamedTuple):
    """A bad record as rejects.jsonl holds it."""

    file: str
    line: int
    reason: str
    text: str  # its first characters


def attempt(record: Record, work: Callable[..., T], *arguments: Any) -> T | Reject:
    """What `work(*arguments)` returns, or, if it raises DataError, the record as a Reject with the reason."""
    try:
        return work(*arguments)
    except DataError as error:
        reason = str(error).removeprefix(f"{record.location}: ")[:MAX_CHARACTERS]
        text = record.data[: 4 * MAX_CHARACTERS].decode("utf-8", "replace")[:MAX_CHARACTERS]
        return Reject(record.file, record.line, reason, text)


class RejectLog:
    """Takes rejects in the order of the records. `on_bad`: "error" raises at the first, "skip" writes them down."""

    def __init__(self, folder: Path, on_bad: str) -> None:
        self.path, self.is_kept = folder / REJECTS, on_bad == "skip"
        self.count = 0
        self._file: IO[str] | None = None

    def __enter__(self) -> RejectLog:
        self._file = self.path.open("w", encoding="utf-8") if self.is_kept else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rejects: Sequence[Reject]) -> None:
        """Write them. Raises DataError "file:line: reason" for the first if there may be none."""
        self.count += len(rejects)
        if rejects and self._file is None:
            first = rejects[0]
            raise DataError(f"{first.file}:{first.line}: {first.reason} (--on-bad skip leaves bad records out)")
        for reject in rejects:
            assert self._file is not None
            self._file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
