"""Read the raw records of input files, with their locations, in bounded memory.

    found = find_inputs(["a.jsonl", "chats/"])           # found.paths, found.skipped
    for record in RecordFile("chats.jsonl.xz"): record.value()

A file is JSON Lines, one JSON array (of any size, pretty-printed or on one line), or whole JSON values one after
another; plain, gzip, xz or zstd; or Parquet. Its content decides which, not its name. A damaged record has an `error`,
so that the caller decides whether to stop; only damage that hides where the next record begins ends the file there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ochat.data import compressed
from ochat.data.compressed import DAMAGED
from ochat.data.json_values import MAX_RECORD_BYTES, JsonValues, explain, is_cut, wrong_at
from ochat.errors import ConfigError, DataError

T = TypeVar("T")
HEAD_BYTES = 1 << 16  # enough to recognise what the file is
UTF8_BOM = b"\xef\xbb\xbf"
PARQUET_MAGIC = b"PAR1"
PARQUET_BATCH_ROWS = 256
LARGE_BATCH_BYTES = 1 << 20  # of columns, where a text that many rows share counts once
TEXTS = (".jsonl", ".ndjson", ".json")
ENDINGS = (*TEXTS, *(text + packed for text in TEXTS for packed in (".gz", ".xz", ".zst")), ".parquet")


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
        files = sorted(_visible_files(path), key=lambda file: file.relative_to(path).parts)
        known = [file for file in files if file.name.lower().endswith(ENDINGS)]
        if not known:
            what = f"only {', '.join(file.name for file in files[:5])}" if files else "no file"
            raise DataError(f"{path}: nothing to read in this folder ({what}); known endings: {', '.join(ENDINGS)}")
        found.paths.extend(known)
        found.skipped.extend(file for file in files if file not in set(known))
    return found


def _visible_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


@dataclass(frozen=True)
class Record:
    """One record as the file holds it; `error` says why it cannot be read."""

    file: str
    line: int  # of its first character, from 1; of Parquet the row
    number: int  # among the file's records, from 1
    data: bytes
    error: str = ""
    is_last: bool = False  # of its file, if that can be read: the only one that can be cut off

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"

    def value(self) -> dict[str, Any]:
        """The JSON object. Raises DataError "file:line: what is wrong"."""
        if self.error:
            raise DataError(f"{self.location}: {self.error}")
        try:
            value = json.loads(self.data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.location}: not UTF-8 at byte {error.start} of the record: save the file as UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            why = explain(error) if self.is_last else wrong_at(error)
            raise DataError(f"{self.location}: {why}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousandfold
            raise DataError(f"{self.location}: JSON that cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.location}: a record must be a JSON object, not {type(value).__name__}")
        return value


class RecordFile:
    """The records of one file, in order; `position` of `size` bytes are read. Memory: one record and a few megabytes.

    Raises: DataError if there is no such file; ConfigError for Parquet where pyarrow is missing.
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
            self._is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
        if self._is_parquet:
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError as error:
                why = "reading Parquet needs the package pyarrow: pip install 'ochat-crlft[data]'"
                raise ConfigError(f"{self.name}: {why}") from error

    def __iter__(self) -> Iterator[Record]:
        return self._rows() if self._is_parquet else self._texts()

    def _rows(self) -> Iterator[Record]:
        for row, data, error, share in _parquet_rows(self.path):
            self.position = int(self.size * share)
            yield Record(self.name, row, row, data, error)

    def _texts(self) -> Iterator[Record]:
        with self.path.open("rb") as raw:
            chunks = self._chunks(raw)
            try:
                head = b""
                while len(head.strip()) < HEAD_BYTES and len(head) <= MAX_RECORD_BYTES and (more := next(chunks, b"")):
                    head += more
                head = head.removeprefix(UTF8_BOM)
            except DAMAGED as error:
                yield Record(self.name, 1, 1, b"", f"damaged or cut compressed file: {error}")
                return
            if not head.strip():
                is_short = len(head) <= MAX_RECORD_BYTES
                what = "the file is empty" if is_short else f"begins with {MAX_RECORD_BYTES >> 20} MiB of blanks"
                yield Record(self.name, 1, 1, b"", what)
            elif _is_json_lines(head):
                yield from self._lines(head, chunks)
            else:
                for number, (line, data, error) in enumerate(JsonValues(head, chunks), start=1):
                    yield Record(self.name, line, number, data, error)

    def _chunks(self, raw: BinaryIO) -> Iterator[bytes]:
        for chunk in compressed.chunks(raw, self.name):
            self.position = raw.tell()
            yield chunk

    def _lines(self, head: bytes, chunks: Iterator[bytes]) -> Iterator[Record]:
        """One record per line; blank lines hold none. One line ahead, to know the last one."""
        last: Record | None = None
        for line, (text, error) in enumerate(_split_lines(head, chunks), start=1):
            if error or text.strip():
                if last is not None:
                    yield last
                last = Record(self.name, line, 1 if last is None else last.number + 1, text, error)
        if last is not None:
            yield replace(last, is_last=True)


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


def _split_lines(head: bytes, chunks: Iterator[bytes]) -> Iterator[tuple[bytes, str]]:
    """(line without its end, ""), or (what there is of it, error) for the last one that can be read."""
    parts: list[bytes] = []
    try:
        chunk = head
        while chunk:
            first, *rest = chunk.split(b"\n")
            parts.append(first)
            for line in rest:
                yield b"".join(parts), ""
                parts = [line]
            if sum(map(len, parts)) > MAX_RECORD_BYTES:
                yield parts[0], f"a line of more than {MAX_RECORD_BYTES >> 20} MiB; the rest of the file was not read"
                return
            chunk = next(chunks, b"")
    except DAMAGED as error:
        yield b"".join(parts), f"damaged or cut compressed file ({error}); what follows was not read"
        return
    if any(parts):
        yield b"".join(parts), ""


def _is_json_lines(head: bytes) -> bool:
    """False for an array, and for a value whose first line is only its beginning, as when JSON is pretty-printed."""
    lines = [line.strip() for line in head.split(b"\n")]
    written = [line for line in lines[:-1] if line]  # the last line may be incomplete
    if head.lstrip().startswith(b"["):
        return False
    if len(written) < 2:
        return not re.match(rb"\s*\{\s*\n", head)
    try:
        json.loads(written[0])
    except (ValueError, RecursionError) as error:
        return not (is_cut(error) and not str(error).startswith("Unterminated") and not written[1].startswith(b"{"))
    return True


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes, str, float]]:
    """The rows of a Parquet file: (row from 1, its JSON, error or "", share of the file that is read); damage ends it.

    Row groups are read in small batches; the rows of a large batch become objects one at a time, because a few bytes of
    a file can expand to thousands of long texts.
    """
    import pyarrow
    import pyarrow.parquet

    number, group = 0, -1
    # what a damaged file makes the library raise, or Python for impossible values (a date in the year 10000000)
    damaged = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError)
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            num_rows = max(file.metadata.num_rows, 1)
            for group in range(file.num_row_groups):
                for row in _parquet_objects(file, group):
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
