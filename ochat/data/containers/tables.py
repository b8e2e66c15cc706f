"""The rows of Parquet and Arrow files as JSON text, in bounded memory.

    for (row, data, error), share in rows(path, "Parquet"): ...     # share of the file that is read by then

Text, numbers, booleans, lists, structs and maps become what JSON has for them; bytes are UTF-8 text; null is absent, as
a table has no other way to leave a value out. Of a value of another type, such as a date, only the type is written
(fields.OtherType): a field that is read refuses it by its name and place, and metadata may be of any type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ochat.data.containers import arrow_stream
from ochat.data.containers.json_text import MAX_RECORD_BYTES, Piece
from ochat.errors import DataError
from ochat.text.fields import OTHER_TYPE, shorten, unique_keys

BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20
LARGE_BATCH_BYTES = 1 << 20  # of columns, where a text that many rows share counts once


def rows(path: Path, kind: str) -> Iterator[tuple[Piece, float]]:
    """The rows of a file, from 1; damage ends it."""
    import pyarrow

    # what a damaged file makes the library raise
    damaged = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError, struct.error)
    row = 0
    try:
        for batch, share in _parquet(path) if kind == "Parquet" else arrow_stream.batches(path):
            for value in _objects(batch):
                row += 1
                yield _piece(row, value), share
        if not row:
            yield (1, b"", "the file is empty"), 1.0
    except DataError as error:
        yield (row + 1, b"", f"{error}; what follows was not read"), 1.0
    except damaged as error:
        yield (row + 1, b"", f"damaged or cut {kind} file: {error}; what follows was not read"), 1.0


def _parquet(path: Path) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet

    # with a buffer pages are read one by one; without, a column of a whole row group
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
        done = 0
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
                done += batch.num_rows
                yield batch, done / max(file.metadata.num_rows, 1)


def _objects(batch: Any) -> Iterator[dict[str, Any] | DataError]:
    """The rows of a batch. Those of a large one become objects one at a time: a few bytes of a file can expand to
    thousands of long texts."""
    _check_names("", batch.schema)
    others = {field.name: field.type for field in batch.schema if not _is_json(field.type)}
    for i, kind in enumerate(batch.schema.types):
        if kind != (safe := _without_times(kind)):
            batch = batch.set_column(i, batch.schema.names[i], batch.column(i).cast(safe))
    at_once = BATCH_ROWS if batch.nbytes < LARGE_BATCH_BYTES else 1
    for first in range(0, batch.num_rows, at_once):
        for value in batch.slice(first, at_once).to_pylist():
            try:
                for name, kind in others.items():
                    value[name] = _marked(value[name], kind, name)
                yield value
            except DataError as error:
                yield error


def _piece(row: int, value: dict[str, Any] | DataError) -> Piece:
    if isinstance(value, DataError):
        return row, b"", str(value)
    data = ENCODER.encode(_without_null(value)).encode()
    is_large = len(data) > MAX_RECORD_BYTES
    return row, b"" if is_large else data, f"a row of more than {MAX_RECORD_BYTES >> 20} MiB" if is_large else ""


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _foreign(value: Any) -> Any:
    """Bytes as text; of what else JSON has no way to write, the type."""
    if not isinstance(value, bytes):
        return {OTHER_TYPE: f"a value of the type {type(value).__name__}"}
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return {OTHER_TYPE: f"bytes that are no UTF-8 text (at byte {error.start})"}


ENCODER = json.JSONEncoder(default=_foreign)


# types of columns


def _check_names(place: str, fields: Any) -> None:
    """Raises: DataError for two columns, or two fields of a struct, of one name."""
    import pyarrow

    names = [field.name for field in fields]
    for field in fields:
        at = place + shorten(field.name)
        if names.count(field.name) > 1:
            raise DataError(f"{at}: two columns of this name; rename one")
        kind = field.type
        while _is_list(kind):
            kind, at = kind.value_type, f"{at}[]"
        if pyarrow.types.is_struct(kind):
            _check_names(f"{at}.", list(kind))


def _is_json(kind: Any) -> bool:
    """Whether values of this type are what JSON can write, or bytes."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_run_end_encoded(kind) or _is_list(kind):
        return _is_json(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    simple = (
        types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string,
        types.is_string_view, types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
    )  # fmt: skip
    return any(is_it(kind) for is_it in simple) or str(kind) == "extension<arrow.json>"


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    views = types.is_list_view(kind) or types.is_large_list_view(kind)
    return views or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _without_times(kind: Any) -> Any:
    """The type with numbers in place of dates and times: Python has no nanoseconds, and no year 10000."""
    import pyarrow
    from pyarrow import types

    if types.is_null(kind):  # pyarrow 26 casts a part of a list of nulls wrongly to the same type
        return pyarrow.int8()
    if types.is_temporal(kind) and kind.bit_width in (32, 64):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if types.is_dictionary(kind) and types.is_temporal(kind.value_type):
        return _without_times(kind.value_type)
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_times(field.type)) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(kind.key_type, kind.item_field.with_type(_without_times(kind.item_type)))
    if not _is_list(kind):
        return kind
    value = kind.value_field.with_type(_without_times(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(value, kind.list_size)
    makers = {
        types.is_list: pyarrow.list_, types.is_large_list: pyarrow.large_list,
        types.is_list_view: pyarrow.list_view, types.is_large_list_view: pyarrow.large_list_view,
    }  # fmt: skip
    return next(make(value) for is_it, make in makers.items() if is_it(kind))


def _marked(value: Any, kind: Any, place: str) -> Any:
    """The value with maps as objects, and with its type in place of each value that JSON cannot hold.

    Raises: DataError for a map that has a key twice.
    """
    from pyarrow import types

    if value is None or _is_json(kind):
        return value
    if _is_list(kind):
        return [_marked(item, kind.value_type, f"{place}[{i}]") for i, item in enumerate(value)]
    if types.is_struct(kind):
        return {field.name: _marked(value[field.name], field.type, f"{place}.{field.name}") for field in kind}
    if not types.is_map(kind):
        return {OTHER_TYPE: f"a value of the type {kind}"}
    pairs = []
    for key, item in value:
        name = key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)
        pairs.append((name, _marked(item, kind.item_type, f"{place}.{name}")))
    try:
        return unique_keys(pairs)
    except DataError as error:
        raise DataError(f"{place}.{error}") from None
