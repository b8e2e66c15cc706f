"""One record, and where records lie in a text: a line each, in one JSON array, or whole values one after another.

    for line, data, error in cut(chunks): ...           # chunks of a file's content
    Record("chats.jsonl", line, 1, data, error).value()

Lines are split alone, so that their JSON is parsed where they are encoded. Of other texts Python's decoder finds where
a value ends; where it runs out of text, more is read and it starts over.

How a bad record is refused: rejected.py.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ochat.errors import DataError

HEAD_BYTES = 1 << 16  # enough to recognise what the file is
UTF8_BOM = b"\xef\xbb\xbf"
# No conversation comes near; memory is bounded by it: parsed JSON takes up to 25 bytes for each of the text's, and some
# tokenizers 140.
MAX_RECORD_BYTES = 1 << 25
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
# what the decoder may stop before because the text ended within it
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
CUT_NUMBER_OR_ESCAPE = re.compile(r"\.|[eE][+-]?|u[0-9a-fA-F]{0,4}")
Piece = tuple[int, bytes, str]  # line from 1, a record's bytes, ""; or line, what there is of it, why it cannot be read


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
            why = f"not UTF-8 at byte {error.start} of the record: save the file as UTF-8"
            raise DataError(f"{self.location}: {why}") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.location}: {_explain(error, self.is_last)}") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.location}: a record must be a JSON object, not {type(value).__name__}")
        return value


def cut(chunks: Iterator[bytes]) -> Iterator[Piece]:
    """The records of a text. An error is the last piece, or in JSON Lines one that ends with its line."""
    head = b""
    while len(head.strip()) < HEAD_BYTES and len(head) <= MAX_RECORD_BYTES and (more := next(chunks, b"")):
        head += more
    head = head.removeprefix(UTF8_BOM)
    if not head.strip():
        is_short = len(head) <= MAX_RECORD_BYTES
        what = "the file is empty" if is_short else f"begins with {MAX_RECORD_BYTES >> 20} MiB of blanks"
        return iter([(1, b"", what)])
    return _lines(head, chunks) if _is_json_lines(head) else iter(_Values(head, chunks))


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
        return not (_is_cut(error) and not str(error).startswith("Unterminated") and not written[1].startswith(b"{"))
    return True


def _lines(head: bytes, chunks: Iterator[bytes]) -> Iterator[Piece]:
    """The lines that are not blank."""
    number, parts = 1, []
    for chunk in itertools.chain([head], chunks):
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for begin in rest:
            if (line := b"".join(parts)).strip():
                yield number, line, ""
            number, parts = number + 1, [begin]
        if sum(map(len, parts)) > MAX_RECORD_BYTES:
            yield number, parts[0], f"a line of more than {MAX_RECORD_BYTES >> 20} MiB; what follows was not read"
            return
    if (line := b"".join(parts)).strip():
        yield number, line, ""


class _Values:
    """The elements of an array, or values one after another; an error comes last, as the next value is lost."""

    def __init__(self, head: bytes, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        # a byte that is not UTF-8 survives as a lone surrogate, and returns as itself in the value's bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line = self.utf8.decode(head), 0, 1

    def __iter__(self) -> Iterator[Piece]:
        try:
            if in_array := self._next_char() == "[":
                self._take(self.at + 1)
                if self._next_char() == "]":
                    raise _LostError("the array is empty")
            while in_array or self._next_char():
                yield self._value()
                in_array = in_array and self._has_another()
        except _LostError as error:
            yield self.line, _to_bytes(self.text[self.at : self.at + 2000]), f"{error}; what follows was not read"

    def _value(self) -> Piece:
        """The value that begins at the next character."""
        self._next_char()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                if not (_is_cut(error) and self._more()):
                    raise _LostError(_explain(error, is_last=True)) from error
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


def _is_cut(error: Exception) -> bool:
    """True if the text may just be too short: its end was reached, not something wrong before it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].strip()
    is_in_word = any(word.startswith(rest) for word in WORDS)
    return is_in_word or error.msg.startswith("Unterminated string") or bool(CUT_NUMBER_OR_ESCAPE.fullmatch(rest))


def _explain(error: Exception, is_last: bool) -> str:
    """What is wrong with a text, and where in its line; the last one of a file may be cut off."""
    if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits; brackets nested thousandfold
        return f"JSON that cannot be read: {error}"
    if is_last and _is_cut(error):
        return f"not JSON, the record is cut off ({error.msg})"
    column = error.pos - error.doc.rfind("\n", 0, error.pos)
    near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return f"not JSON: {error.msg} (column {column}), near {near!r}"
