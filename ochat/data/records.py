"""Raw records of an input file with their places, read in bounded memory: the step before any conversation is understood.

    for record in records.read("chats.jsonl.xz"): record.value()

JSON Lines, one JSON array (however large, pretty-printed or on one line), or whole JSON values one after another; plain,
gzip, xz or zstd. What the file is, is told by its content. A damaged place becomes a record with an `error`, so that the
caller decides whether to stop; only after damage that hides where the next record begins does the file end there.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ochat.errors import ConfigError, DataError

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # enough to tell what the file is
MAX_RECORD_BYTES = 1 << 28  # memory is bounded by it; no conversation comes near
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
UTF8_BOM = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Record:
    """One record as it stands in the file; `error` says why there is none."""

    file: str
    line: int  # of its first character, from 1
    number: int  # among the file's records, from 1
    data: bytes
    error: str = ""

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
            raise DataError(f"{self.place}: not UTF-8 at byte {error.start} of the record: save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place}: {_explain(error)}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested thousandfold
            raise DataError(f"{self.place}: JSON that cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.place}: a record must be a JSON object, not {type(value).__name__}")
        return value


class RecordFile:
    """An iterable over the records of one file; `position` of `size` bytes are read. Raises DataError if it cannot be opened."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self.position = 0
        if not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no such file"
            raise DataError(f"{self.name}: {what}; an input is a JSON Lines or JSON file")
        self.size = self.path.stat().st_size

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as raw:
            chunks = self._chunks(raw)
            try:
                head = b""
                while len(head.strip()) < HEAD_BYTES and (more := next(chunks, b"")):
                    head += more
                head = head.removeprefix(UTF8_BOM)
            except DAMAGED as error:
                yield Record(self.name, 1, 1, b"", f"damaged or cut compressed file: {error}")
                return
            if not head.strip():
                yield Record(self.name, 1, 1, b"", "the file is empty")
            elif _is_json_lines(head):
                yield from self._lines(head, chunks)
            else:
                yield from _JsonValues(self.name, head, chunks)

    def _chunks(self, raw: BinaryIO) -> Iterator[bytes]:
        for chunk in _decompressed(raw, self.name):
            self.position = raw.tell()
            yield chunk

    def _lines(self, head: bytes, chunks: Iterator[bytes]) -> Iterator[Record]:
        """One record per line; blank lines hold none."""
        number = line = 0
        for text, error in _split_lines(head, chunks):
            line += 1
            if error or text.strip():
                number += 1
                yield Record(self.name, line, number, text, error)


def read(path: str | Path) -> RecordFile:
    """The records of `path`, in order. Memory: one record and a few megabytes."""
    return RecordFile(path)


def _decompressed(raw: BinaryIO, name: str) -> Iterator[bytes]:
    """Chunks of the file's plain content."""
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        yield from _zstd(raw, name)
        return
    stream: Any = raw
    if magic.startswith(b"\x1f\x8b"):
        stream = gzip.GzipFile(fileobj=raw)
    elif magic == b"\xfd7zXZ\x00":
        stream = lzma.LZMAFile(raw)
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def _zstd(raw: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(f"{name}: reading zstd needs the package zstandard: pip install 'ochat[data]'") from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while data := raw.read(CHUNK_BYTES):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if not frame.eof:
        raise EOFError("the file ends inside a zstd frame")


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
        return not (_is_cut(error) and not str(error).startswith("Unterminated") and not written[1].startswith(b"{"))
    return True


class _JsonValues:
    """Iterates over the elements of an array, or over values one after another, decoding no more than a record ahead."""

    def __init__(self, name: str, head: bytes, chunks: Iterator[bytes]) -> None:
        self.name, self.chunks = name, chunks
        # a byte that is not UTF-8 survives as a lone surrogate, and returns as itself in Record.data
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line = self.utf8.decode(head), 0, 1
        self.number = 0

    def __iter__(self) -> Iterator[Record]:
        try:
            if in_array := self._next_char() == "[":
                self.at += 1
                if self._next_char() == "]":
                    self.at += 1
                    yield self._bad("the array is empty")
                    in_array = False
            while in_array or self._next_char():
                yield self._value()
                if in_array:
                    in_array = self._separator()
        except _BrokenError as error:
            yield self._bad(f"{error}; what follows was not read")
        except DAMAGED as error:
            yield self._bad(f"damaged or cut compressed file ({error}); what follows was not read")

    def _value(self) -> Record:
        """The value that begins at the next character."""
        self._next_char()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                if not (_is_cut(error) and self._more()):
                    raise _BrokenError(_explain(error)) from error
        self.number += 1
        line = self.line
        return Record(self.name, line, self.number, self._take(end).encode("utf-8", "surrogateescape"))

    def _separator(self) -> bool:
        """Consume the comma after an element (True), or the end of the array (False)."""
        char = self._next_char()
        if char == ",":
            self.at += 1
            return True
        if char == "]":
            self.at += 1
            if self._next_char():
                raise _BrokenError("text after the end of the array")
            return False
        raise _BrokenError("expected ',' or ']' after an element of the array" if char else "the array is cut off: no ']'")

    def _next_char(self) -> str:
        """The next character that is no space, without consuming it; "" at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            assert match is not None
            self._take(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _take(self, end: int) -> str:
        taken = self.text[self.at : end]
        self.line += taken.count("\n")
        self.at = end
        return taken

    def _more(self) -> bool:
        """Read on and forget what was consumed. Doubles what it holds, so that a large record costs linear time."""
        parts = [self.text[self.at :]]
        wanted = max(len(parts[0]), 1)
        if wanted > MAX_RECORD_BYTES:
            raise _BrokenError(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB")
        while wanted > 0 and (chunk := next(self.chunks, b"")):
            parts.append(self.utf8.decode(chunk))
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1

    def _bad(self, error: str) -> Record:
        self.number += 1
        text = self.text[self.at : self.at + 2000].encode("utf-8", "surrogateescape")
        return Record(self.name, self.line, self.number, text, error)


class _BrokenError(Exception):
    """The place of the next record is lost."""


def _is_cut(error: Exception) -> bool:
    """True if the text may just be too short: its end was reached, not something wrong before it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :]
    return error.msg.startswith("Unterminated string") or len(rest.strip()) < len("-Infinity")


def _explain(error: Exception) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return f"JSON that cannot be read: {error}"
    if _is_cut(error):
        return f"not JSON, the record is cut off ({error.msg})"
    near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return f"not JSON: {error.msg} near {near!r}"
