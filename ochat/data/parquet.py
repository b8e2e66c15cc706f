"""Rows of a Parquet file as records: the same objects as in JSON Lines, the row's number in place of the line.

    for record in ParquetFile("chats.parquet"): record.value()

Read row group by row group in small batches; of a large batch, rows become objects one at a time: a few bytes of a file
can stand for thousands of long texts. A field that is null is a field that is not there: Parquet has no other way to
leave one out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.data.json_values import MAX_RECORD_BYTES
from ochat.data.records import Record, RecordFile
from ochat.errors import ConfigError

MAGIC = b"PAR1"
BATCH_ROWS = 256
LARGE_BATCH_BYTES = 1 << 20  # of columns, where a text that many rows share counts once


class ParquetFile(RecordFile):
    """The rows of one file. Raises ConfigError where pyarrow is missing."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError(
                f"{self.name}: reading Parquet needs the package pyarrow: pip install 'ochat-crlft[data]'"
            ) from error
        self._pyarrow = pyarrow

    def __iter__(self) -> Iterator[Record]:
        number, group = 0, -1
        # what a damaged file makes the library raise, or Python where a value is none (a date of the year 10000000)
        damaged = (self._pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)
        try:
            with self._pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
                num_rows = max(file.metadata.num_rows, 1)
                for group in range(file.num_row_groups):
                    for row in self._rows(file, group):
                        number += 1
                        self.position = self.size * min(number, num_rows) // num_rows
                        yield _record(self.name, number, row)
        except damaged as error:
            where = f" in row group {group}" if group >= 0 else ""
            yield Record(self.name, number + 1, number + 1, b"", f"damaged or cut Parquet file{where}: {error}")
            return
        if number == 0:
            yield Record(self.name, 1, 1, b"", "the file is empty")

    def _rows(self, file: Any, group: int) -> Iterator[dict[str, Any]]:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
            at_once = BATCH_ROWS if batch.nbytes < LARGE_BATCH_BYTES else 1
            for first in range(0, batch.num_rows, at_once):
                yield from batch.slice(first, at_once).to_pylist()


def is_parquet(path: Path) -> bool:
    """Told by the first bytes, not by the name."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _record(name: str, number: int, row: dict[str, Any]) -> Record:
    data = json.dumps(_present(row), default=str).encode()
    if len(data) > MAX_RECORD_BYTES:
        return Record(name, number, number, b"", f"a row of more than {MAX_RECORD_BYTES >> 20} MiB")
    return Record(name, number, number, data)


def _present(value: Any) -> Any:
    """Without fields that are null."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
