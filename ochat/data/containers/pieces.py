"""Where the records of a text lie: on a line each, in one JSON array, or whole values one after another.

    for line, data, error in cut(chunks): ...           # chunks of a file's text in UTF-8

Lines are split alone, so that their JSON is parsed where they are encoded. Of other texts Python's decoder finds where
a value ends; where it runs out of text, more is read and it starts over. A list whose elements are messages is one
record, so an array of messages is one conversation, and so is each line of a file whose lines are lists.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from ochat.data.containers.compressed import DamagedError
from ochat.data.containers.json_text import MAX_RECORD_BYTES, Piece, explain, is_cut
from ochat.text.records.keys import MESSAGE

HEAD_BYTES = 1 << 16  # enough to recognise what the file is
UTF8_BOM = b"\xef\xbb\xbf"
BLANK = (b"", UTF8_BOM)  # what a stripped line without a record is
SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # a BOM stands where files were joined
OLD_LINE_END = re.compile(rb"\r[^\r\n]")
DECODER = json.JSONDecoder()


def cut(chunks: Iterator[bytes]) -> Iterator[Piece]:
    """The records of a text. An error is the last piece, or in JSON Lines one that ends with its line.

    Raises: DamagedError where reading the chunks does, after the records before.
    """
    head = b""
    try:
        while len(head.strip()) < HEAD_BYTES and len(head) <= MAX_RECORD_BYTES and (more := next(chunks, b"")):
            head += more
    except DamagedError as error:
        if not head.strip():
            raise
        chunks = _failing(error)
    head = head.removeprefix(UTF8_BOM)
    if not head.strip():
        is_short = len(head) <= MAX_RECORD_BYTES
        what = "the file is empty" if is_short else f"begins with {MAX_RECORD_BYTES >> 20} MiB of blanks"
        return iter([(1, b"", what)])
    if b"\n" not in head and OLD_LINE_END.search(head):
        head, chunks = head.replace(b"\r", b"\n"), (chunk.replace(b"\r", b"\n") for chunk in chunks)
    return _lines(head, chunks) if _is_json_lines(head) else iter(_Values(head, chunks))


def _failing(error: DamagedError) -> Iterator[bytes]:
    raise error
    yield


def _is_json_lines(head: bytes) -> bool:
    """False for an array of records, and for a value whose first line is only its beginning, as when JSON is
    pretty-printed."""
    lines = [line.strip() for line in head.split(b"\n")]
    written = [line for line in lines[:-1] if line]  # the last line may be incomplete
    if head.lstrip().startswith(b"["):
        first, *others = filter(None, lines)
        return bool(others) and others[0].startswith(b"[") and _is_whole(first)
    if len(written) < 2:
        return not re.match(rb"\s*\{\s*\n", head)
    try:
        json.loads(written[0])
    except (ValueError, RecursionError) as error:
        return not (is_cut(error) and not str(error).startswith("Unterminated") and not written[1].startswith(b"{"))
    return True


def _is_whole(line: bytes) -> bool:
    try:
        return bool(json.loads(line))
    except (ValueError, RecursionError):
        return False


def _is_message(value: Any) -> bool:
    """Whether an element of a list has a role, and nothing that a message cannot have."""
    if not isinstance(value, dict) or not any(name in value for name in MESSAGE.names("role")):
        return False
    return all(name in MESSAGE.by_name for name in value)


def _lines(head: bytes, chunks: Iterator[bytes]) -> Iterator[Piece]:
    """The lines that are not blank."""
    number, parts = 1, []
    for chunk in itertools.chain([head], chunks):
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for begin in rest:
            if (line := b"".join(parts)).strip() not in BLANK:
                yield number, line, ""
            number, parts = number + 1, [begin]
        if sum(map(len, parts)) > MAX_RECORD_BYTES:
            yield number, parts[0], f"a line of more than {MAX_RECORD_BYTES >> 20} MiB; what follows was not read"
            return
    if (line := b"".join(parts)).strip() not in BLANK:
        yield number, line, ""


class _Values:
    """The elements of an array of records, or values one after another; an error comes last, as the next value is
    lost."""

    def __init__(self, head: bytes, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        # a byte that is not UTF-8 survives as a lone surrogate, and returns as itself in the value's bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line = self.utf8.decode(head), 0, 1

    def __iter__(self) -> Iterator[Piece]:
        try:
            if in_array := self._next_char() == "[" and not self._begins_with_message():
                self._take(self.at + 1)
                if self._next_char() == "]":
                    raise _LostError("the array is empty")
            while in_array or self._next_char():
                yield self._value()
                in_array = in_array and self._has_another()
        except _LostError as error:
            yield self.line, _to_bytes(self.text[self.at : self.at + 2000]), f"{error}; what follows was not read"

    def _begins_with_message(self) -> bool:
        """Whether the first element of the array that begins here is a message."""
        while True:
            begin = SPACE.match(self.text, self.at + 1)
            assert begin is not None
            try:
                return _is_message(DECODER.raw_decode(self.text, begin.end())[0])
            except (ValueError, RecursionError) as error:
                if not (is_cut(error) and self._more()):
                    return False

    def _value(self) -> Piece:
        """The value that begins at the next character."""
        self._next_char()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                if not (is_cut(error) and self._more()):
                    raise _LostError(explain(error, is_last=True)) from error
        line = self.line
        return line, _to_bytes(self._take(end)), ""

    def _has_another(self) -> bool:
        """Consume the comma after an element (True), or the end of the array (False)."""
        char = self._next_char()
        if char not in (",", "]"):
            cut_off = "the array is cut off: no ']'"
            raise _LostError("expected ',' or ']' after an element of the array" if char else cut_off)
        self._take(self.at + 1)
        if char == "]" and self._next_char():
            raise _LostError("text after the end of the array")
        return char == ","

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
        wanted = min(max(len(parts[0]), 1), MAX_RECORD_BYTES + 1 - len(parts[0]))
        if wanted <= 0:
            raise _LostError(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB")
        while wanted > 0 and (chunk := next(self.chunks, b"")):
            parts.append(self.utf8.decode(chunk))
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1


class _LostError(Exception):
    """The place of the next record is lost."""


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
