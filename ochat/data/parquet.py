"""Rows of a Parquet file as records: the same objects as in JSON Lines, the row's number in place of the line.

    for record in ParquetFile("chats.parquet"): record.value()

Read row group by row group in small batches. A field that is null is a field that is not there: Parquet has no other
way to leave one out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.data.records import Record, RecordFile
from ochat.errors import ConfigError

MAGIC = b"PAR1"
BATCH_ROWS = 256


class ParquetFile(RecordFile):
    """The rows of one file. Raises ConfigError where pyarrow is missing."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        try:
            import pyarrow.parquet as library
        except ImportError as error:
            raise ConfigError(
                f"{self.name}: reading Parquet needs the package pyarrow: pip install 'ochat[data]'"
            ) from error
        self._library = library

    def __iter__(self) -> Iterator[Record]:
        number = 0
        try:
            with self._library.ParquetFile(self.path, pre_buffer=False) as file:
                num_rows = file.metadata.num_rows
                for row in self._rows(file):
                    number += 1
                    self.position = self.size * number // num_rows
                    yield Record(self.name, number, number, json.dumps(_present(row), default=str).encode())
        except (OSError, ValueError) as error:  # pyarrow's errors are among them
            yield Record(self.name, number + 1, number + 1, b"", f"damaged or cut Parquet file: {error}")
            return
        if number == 0:
            yield Record(self.name, 1, 1, b"", "the file is empty")

    def _rows(self, file: Any) -> Iterator[dict[str, Any]]:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                yield from batch.to_pylist()


def is_parquet(path: Path) -> bool:
    """Told by the first bytes, not by the name."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _present(value: Any) -> Any:
    """Without fields that are null."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
