"""Read the rows of a Parquet file as JSON objects, like the lines of JSON Lines.

    for row, data, error, share in rows(Path("chats.parquet")): ...

Row groups are read in small batches; the rows of a large batch become objects one at a time, because a few bytes of a
file can expand to thousands of long texts. A null field counts as absent: Parquet has no other way to leave one out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.data.json_values import MAX_RECORD_BYTES
from ochat.errors import ConfigError

MAGIC = b"PAR1"  # the first bytes of every Parquet file
BATCH_ROWS = 256
LARGE_BATCH_BYTES = 1 << 20  # of columns, where a text that many rows share counts once
Row = tuple[int, bytes, str, float]


def check_installed(name: str) -> None:
    """Raises ConfigError where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{name}: reading Parquet needs the package pyarrow: pip install 'ochat-crlft[data]'"
        ) from error


def rows(path: Path) -> Iterator[Row]:
    """(row from 1, its JSON, "", share of the file that is read), or with an error instead of JSON; damage ends it."""
    import pyarrow
    import pyarrow.parquet

    number, group = 0, -1
    # what a damaged file makes the library raise, or Python for impossible values (a date in the year 10000000)
    damaged = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            num_rows = max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):
                for row in _objects(file, group):
                    number += 1
                    data = json.dumps(_without_null(row), default=str).encode()
                    is_large = len(data) > MAX_RECORD_BYTES
                    error = f"a row of more than {MAX_RECORD_BYTES >> 20} MiB" if is_large else ""
                    yield number, b"" if is_large else data, error, min(number / num_rows, 1)
    except damaged as error:
        where = f" in row group {group}" if group >= 0 else ""
        yield number + 1, b"", f"damaged or cut Parquet file{where}: {error}", 1
        return
    if number == 0:
        yield 1, b"", "the file is empty", 1


def _objects(file: Any, group: int) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
        at_once = BATCH_ROWS if batch.nbytes < LARGE_BATCH_BYTES else 1
        for first in range(0, batch.num_rows, at_once):
            yield from batch.slice(first, at_once).to_pylist()


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value
