"""Read the raw records of input files, with their locations, in bounded memory.

    for record in RecordFile("chats.jsonl.xz"): record.value()
    for batch, position in batches([RecordFile("chats.jsonl.xz")]): ...

A file is JSON Lines, one JSON array (of any size, pretty-printed or on one line), or whole JSON values one after
another, of UTF-8 or UTF-16, plain or compressed; or a table. Its content decides which, not its name (containers/). A
damaged record has an `error`, so that the caller decides whether to stop; only damage that hides where the next record
begins ends the file there.
"""

from __future__ import annotations

import codecs
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ochat.data.containers import compressed, kinds, pieces, tables
from ochat.data.containers.compressed import CHUNK_BYTES, DamagedError
from ochat.data.containers.json_text import Piece
from ochat.data.inputs import find_inputs, folder_columns
from ochat.data.records import Record
from ochat.errors import ConfigError, DataError

T = TypeVar("T")
PACKAGES = {"zstd": "zstandard", "Parquet": "pyarrow", "Arrow": "pyarrow"}  # that reading them needs
BATCH_RECORDS, BATCH_BYTES = 512, 1 << 20  # enough to be worth a message to another process
# What no real file unpacks to. A few kilobytes can hold a text of megabytes that thousands of rows share
UNPACKED_TIMES, UNPACKED_BYTES = 1000, 1 << 26
Batch = tuple[list[Record], int]  # records, and the bytes of all files read by then


class RecordFile:
    """The records of one file, in order; `position` of `size` bytes are read. Memory: one record and a few megabytes.

    Raises: DataError if there is no such file, or if it is no file of records, such as an archive; ConfigError where a
    package is missing that its kind needs.
    """

    def __init__(self, path: str | Path, condition: str = "") -> None:
        self.path, self.condition, self.columns = Path(path), condition, folder_columns(Path(path))
        self.name = str(path)
        self.position = 0
        self._junk = ""  # what follows the end of the data
        if not self.path.is_file():
            what = "a pipe or a device; write it into a file" if self.path.exists() else "no such file"
            what = "a folder" if self.path.is_dir() else what
            raise DataError(f"{self.name}: {what}; an input is a JSON Lines, JSON, Parquet or Arrow file")
        self.size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(kinds.HEAD_BYTES)
        self._kind = kinds.packing(head)
        package = PACKAGES.get(self._kind)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{self.name}: reading it needs {package}: pip install 'ochat-crlft[data]'")
        if self._kind in kinds.TABLES:
            return
        if self._kind:
            head = self._first_bytes()
        kinds.refuse(self.path, head, self._kind)
        self._encoding = kinds.encoding_of(head)

    def __iter__(self) -> Iterator[Record]:
        last, damage = Record(self.name, 0, 0, b""), ""
        try:
            with self.path.open("rb") as raw:
                for line, data, error in self._pieces(raw):
                    if last.number:
                        yield last
                    last = Record(self.name, line, last.number + 1, data, error, False, self.condition, self.columns)
        except DamagedError as error:
            damage = f"{error}; what follows was not read"
        if last.number:
            yield replace(last, is_last=not damage and self._kind not in kinds.TABLES)
        if damage := damage or self._junk:
            yield Record(self.name, last.line + last.data.count(b"\n") + 1, last.number + 1, b"", damage)

    def _pieces(self, raw: BinaryIO) -> Iterator[Piece]:
        """The records. Raises: DamagedError where they are more than a file of this size can sensibly hold."""
        left = max(UNPACKED_TIMES * self.size, UNPACKED_BYTES)
        for piece in self._rows() if self._kind in kinds.TABLES else pieces.cut(self._text(raw)):
            if (left := left - len(piece[1])) < 0:
                raise DamagedError(
                    f"what the file holds is more than {UNPACKED_TIMES:,} times its {self.size:,} bytes, as of a text "
                    "of megabytes that rows share; if it is meant, write plain JSON Lines"
                )
            yield piece

    def _first_bytes(self) -> bytes:
        """What a compressed file begins with, b"" where it is damaged: reading it says so."""
        with self.path.open("rb") as raw:
            try:
                chunks = compressed.decompress(raw, self._kind, kinds.HEAD_BYTES)
                return next(chunks, b"")[: kinds.HEAD_BYTES]
            except DamagedError:
                return b""

    def _text(self, raw: BinaryIO) -> Iterator[bytes]:
        """The plain content in UTF-8, or in what cannot be told."""
        chunks = self._unpacked(raw) if self._kind else iter(lambda: raw.read(CHUNK_BYTES), b"")
        decoder = codecs.getincrementaldecoder(self._encoding)() if self._encoding != "utf-8" else None
        for chunk in itertools.chain(chunks, [b""]):
            self.position = raw.tell()
            try:
                text = decoder.decode(chunk, final=not chunk).encode("utf-8") if decoder else chunk
            except UnicodeError as error:
                what = f"not {self._encoding.upper()}, as which the file begins ({error}): it is damaged or cut"
                raise DamagedError(what) from None
            if text:
                yield text

    def _unpacked(self, raw: BinaryIO) -> Iterator[bytes]:
        try:
            yield from compressed.decompress(raw, self._kind)
        except DamagedError as error:
            if not error.is_whole:
                raise
            self._junk = str(error)

    def _rows(self) -> Iterator[Piece]:
        for piece, share in tables.rows(self.path, self._kind):
            self.position = int(self.size * share)
            yield piece
        self.position = self.size


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
    for file in find_inputs([path], all_splits=True).paths:
        for record in RecordFile(file):
            value = record.value()
            try:
                parsed = parse(value)
            except DataError as error:
                raise DataError(f"{record.location}: {error}") from None
            yield record, parsed
