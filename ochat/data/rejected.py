"""How a bad record is refused: its file, line and reason, and then a stop, or a line of rejects.jsonl (--on-bad).

    reject = refuse(record, "items[1].weight: expected a number, got text")
    log = RejectLog(folder, "skip");  log.add([reject]);  log.close()

The reason names the field: text/conversation.py finds it for a conversation, text/record_formats.py for other formats.
Readers and the encoder raise DataError with it, and the encoder calls `refuse`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ochat.data.records import Record
from ochat.errors import DataError
from ochat.files.jsonl import JsonlWriter

REJECTS = "rejects.jsonl"
MAX_CHARACTERS = 2000


class Reject(NamedTuple):
    """A bad record as rejects.jsonl holds it."""

    file: str
    line: int
    reason: str
    text: str  # its first characters


def refuse(record: Record, reason: str) -> Reject:
    """The record and why it is bad; a place at the reason's start is not repeated."""
    reason = reason.removeprefix(f"{record.location}: ")[:MAX_CHARACTERS]
    text = record.data[: 4 * MAX_CHARACTERS].decode("utf-8", "replace")[:MAX_CHARACTERS]
    return Reject(record.file, record.line, reason, text)


class RejectLog:
    """Takes rejects in the order of the records. `on_bad`: "error" stops at the first, "skip" writes all down."""

    def __init__(self, folder: Path, on_bad: str) -> None:
        self.count, self.stops = 0, on_bad == "error"
        self._lines = JsonlWriter(folder / REJECTS)
        if not self.stops:
            self._lines.path.touch()

    def add(self, rejects: Sequence[Reject]) -> None:
        """Write them down. Raises: DataError "file:line: reason" for the first if there may be none."""
        if rejects and self.stops:
            first = rejects[0]
            raise DataError(f"{first.file}:{first.line}: {first.reason} (--on-bad skip leaves bad records out)")
        self._lines.append(reject._asdict() for reject in rejects)
        self.count += len(rejects)

    def close(self) -> None:
        """Write what a full disk made wait. Raises: OSError where it still cannot be written."""
        self._lines.flush()
