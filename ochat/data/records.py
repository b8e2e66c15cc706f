"""Raw records of an input file with their places, read in bounded memory.

    for record in input_files.read_records("chats.jsonl.xz"): record.value()

JSON Lines, one JSON array (however large, pretty-printed or on one line), or whole JSON values one after another;
plain, gzip, xz or zstd; or Parquet (parquet.py). What the file is, is told by its content. A damaged place becomes a
record with an `error`, so that the caller decides whether to stop; only after damage that hides where the next record
begins does the file end there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ochat.data import compressed
from ochat.data.compressed import DAMAGED
from ochat.data.json_values import MAX_RECORD_BYTES, JsonValues, explain, is_cut, wrong_at
from ochat.errors import DataError

HEAD_BYTES = 1 << 16  # enough to tell what the file is
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One record as it stands in the file; `error` says why there is none."""

    file: str
    line: int  # of its first character, from 1
    number: int  # among the file's records, from 1
    data: bytes
    error: str = ""
    is_last: bool = False  # of its file, as far as that can be read: the only one that can be cut off

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    def value(self) -> dict[str, Any]:
        """The JSON object. Raises DataError "file:line: what is wrong"."""
        if self.error:
            raise DataError(f"{self.place}: {self.error}")
        try:
            value = json.loads(self.data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.place}: not UTF-8 at byte {error.start} of the record: save the file as UTF-8"
            ) from error
        except json.JSONDecodeError as error:
            why = explain(error) if self.is_last else wrong_at(error)
            raise DataError(f"{self.place}: {why}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousandfold
            raise DataError(f"{self.place}: JSON that cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.place}: a record must be a JSON object, not {type(value).__name__}")
        return value


class RecordFile:
    """The records of one file; `position` of `size` bytes are read. Raises DataError if there is no such file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.position = 0
        if not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no such file"
            raise DataError(f"{self.name}: {what}; an input is a JSON Lines, JSON or Parquet file")
        self.size = self.path.stat().st_size

    def __iter__(self) -> Iterator[Record]:
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
    written = [line for line in lines[:-1] if line]  # whole lines: the last one may go on in the next chunk
    if head.lstrip().startswith(b"["):
        return False
    if len(written) < 2:
        return not re.match(rb"\s*\{\s*\n", head)
    try:
        json.loads(written[0])
    except (ValueError, RecursionError) as error:
        return not (is_cut(error) and not str(error).startswith("Unterminated") and not written[1].startswith(b"{"))
    return True
