"""Read the raw records of input files, with their locations, in bounded memory.

    found = find_inputs(["a.jsonl", "chats/"])           # found.paths, found.skipped
    for record in RecordFile("chats.jsonl.xz"): record.value()
    for batch, position in batches([RecordFile("chats.jsonl.xz")]): ...

A file is JSON Lines, one JSON array (of any size, pretty-printed or on one line), or whole JSON values one after
another; plain, gzip, xz or zstd; or Parquet. Its content decides which, not its name. A damaged record has an `error`,
so that the caller decides whether to stop; only damage that hides where the next record begins ends the file there.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ochat.data import records
from ochat.data.records import MAX_RECORD_BYTES, Piece, Record
from ochat.errors import ConfigError, DataError

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 10  # at most 32 MiB come of them: zstd makes a block of 128 KiB of 4 bytes
XZ_MEMORY_BYTES = 1 << 28  # four times what `xz -9` needs; a file can ask for 4 GiB
GZIP, XZ, ZSTD, PARQUET = b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PAR1"  # what files begin with
PACKAGES = {ZSTD: "zstandard", PARQUET: "pyarrow"}  # that reading them needs
PARQUET_BATCH_ROWS = 256
LARGE_BATCH_BYTES = 1 << 20  # of columns, where a text that many rows share counts once
BATCH_RECORDS, BATCH_BYTES = 512, 1 << 20  # enough to be worth a message to another process
TEXTS = (".jsonl", ".ndjson", ".json")
ENDINGS = (*TEXTS, *(text + packed for text in TEXTS for packed in (".gz", ".xz", ".zst")), ".parquet")
Batch = tuple[list[Record], int]  # records, and the bytes of all files read by then


class InputFiles(NamedTuple):
    """Files to read, in order, and other files of the input folders, such as a README."""

    paths: list[Path]
    skipped: list[Path]


def find_inputs(inputs: Sequence[str | Path]) -> InputFiles:
    """The files that `--input` names: files as they are; of a folder all files with known endings, sorted by their
    paths, the same on every machine, without hidden ones.

    Raises: DataError for a folder without a file to read; a missing file is reported when it is opened.
    """
    found = InputFiles([], [])
    for path in map(Path, inputs):
        if not path.is_dir():
            found.paths.append(path)
            continue
        inside = [(file, file.relative_to(path).parts) for file in path.rglob("*") if file.is_file()]
        files = sorted(file for file, parts in inside if not any(part.startswith(".") for part in parts))
        known = [file for file in files if file.name.lower().endswith(ENDINGS)]
        if not known:
            what = f"only {', '.join(file.name for file in files[:5])}" if files else "no file"
            raise DataError(f"{path}: nothing to read in this folder ({what}); known endings: {', '.join(ENDINGS)}")
        found.paths.extend(known)
        found.skipped.extend(sorted(set(files) - set(known)))
    return found


class RecordFile:
    """The records of one file, in order; `position` of `size` bytes are read. Memory: one record and a few megabytes.

    Raises: DataError if there is no such file; ConfigError where a package is missing that its kind needs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.position = 0
        if not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no such file"
            raise DataError(f"{self.name}: {what}; an input is a JSON Lines, JSON or Parquet file")
        self.size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(6)
        self._kind = next((kind for kind in (GZIP, XZ, ZSTD, PARQUET) if start.startswith(kind)), b"")
        package = PACKAGES.get(self._kind)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{self.name}: reading it needs {package}: pip install 'ochat-crlft[data]'")

    def __iter__(self) -> Iterator[Record]:
        last = Record(self.name, 0, 0, b"")
        try:
            with self.path.open("rb") as raw:
                for line, data, error in self._rows() if self._kind == PARQUET else records.cut(self._chunks(raw)):
                    if last.number:
                        yield last
                    last = Record(self.name, line, last.number + 1, data, error)
            yield replace(last, is_last=True)
        except _DamagedError as error:
            if last.number:
                yield last
            what = f"damaged or cut compressed file ({error}); what follows was not read"
            yield Record(self.name, last.line + last.data.count(b"\n") + 1, last.number + 1, b"", what)

    def _chunks(self, raw: BinaryIO) -> Iterator[bytes]:
        """The plain content."""
        pieces = _decompress(raw, self._kind) if self._kind else iter(lambda: raw.read(CHUNK_BYTES), b"")
        for chunk in pieces:
            self.position = raw.tell()
            yield chunk

    def _rows(self) -> Iterator[Piece]:
        """The rows of a Parquet file as JSON; damage ends it.

        Row groups are read in small batches; the rows of a large batch become objects one at a time, because a few
        bytes of a file can expand to thousands of long texts.
        """
        import pyarrow
        import pyarrow.parquet

        row, group = 0, -1
        # what a damaged file makes the library raise, or Python for impossible values (a date in the year 10000000)
        damaged = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)
        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False) as file:
                for group in range(file.num_row_groups):
                    for values in _parquet_objects(file, group):
                        row += 1
                        self.position = int(self.size * min(row / max(file.metadata.num_rows, 1), 1))
                        data = json.dumps(_without_null(values), default=str).encode()
                        is_large = len(data) > MAX_RECORD_BYTES
                        error = f"a row of more than {MAX_RECORD_BYTES >> 20} MiB" if is_large else ""
                        yield row, b"" if is_large else data, error
            if not row:
                yield 1, b"", "the file is empty"
        except damaged as error:
            where = f" in row group {group}" if group >= 0 else ""
            yield row + 1, b"", f"damaged or cut Parquet file{where}: {error}"


def batches(files: Sequence[RecordFile], number: int = 1, of: int = 1) -> Iterator[Batch]:
    """Of the records of all files, in order, every `of`-th from the `number`-th on."""
    batch: list[Record] = []
    num_bytes = 0
    for record in itertools.islice(itertools.chain.from_iterable(files), number - 1, None, of):
        batch.append(record)
        num_bytes += len(record.data)
        if len(batch) == BATCH_RECORDS or num_bytes >= BATCH_BYTES:
            yield batch, sum(file.position for file in files)
            batch, num_bytes = [], 0
    if batch:
        yield batch, sum(file.position for file in files)


def parse_records(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[Record, T]]:
    """The records of a file, or of all files in a folder, each with what `parse` makes of it.

    Raises: DataError naming file and line, also for one that `parse` raises.
    """
    for file in find_inputs([path]).paths:
        for record in RecordFile(file):
            value = record.value()
            try:
                parsed = parse(value)
            except DataError as error:
                raise DataError(f"{record.location}: {error}") from None
            yield record, parsed


def _parquet_objects(file: Any, group: int) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group]):
        at_once = PARQUET_BATCH_ROWS if batch.nbytes < LARGE_BATCH_BYTES else 1
        for first in range(0, batch.num_rows, at_once):
            yield from batch.slice(first, at_once).to_pylist()


def _without_null(value: Any) -> Any:
    """Without null fields: Parquet has no other way to leave one out."""
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


class _DamagedError(Exception):
    """The rest of a compressed file cannot be read."""


def _decompress(raw: BinaryIO, kind: bytes) -> Iterator[bytes]:
    """What compressed streams hold, one after another; zeros may pad them. Reads little at a time, because a small file
    can expand to gigabytes."""
    stream, waiting, damage = _decompressor(kind), bytearray(), ""
    try:
        while data := raw.read(COMPRESSED_BYTES):
            while data := data.lstrip(b"\0") if stream.eof else data:
                stream = _decompressor(kind) if stream.eof else stream
                waiting += stream.decompress(data)
                data = stream.unused_data
            if len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting)
                waiting.clear()
        damage = "" if stream.eof else "the file ends inside it"
    except Exception as error:  # every library has its own
        damage = str(error) or repr(error)
    if waiting:
        yield bytes(waiting)
    if damage:
        raise _DamagedError(damage)


def _decompressor(kind: bytes) -> Any:
    if kind == GZIP:
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    if kind == XZ:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()  # refuses windows of more than 128 MiB
