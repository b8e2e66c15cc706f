"""The values of a JSON array, however large, one at a time and with their lines; or of JSON values one after another.

    for line, data, error in JsonValues(head, chunks): ...

Python's decoder finds where a value ends; where it runs out of text, more is read and it starts over.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from ochat.data.compressed import DAMAGED

# No conversation comes near; memory is bounded by it: parsed JSON takes up to 25 bytes for each of the text's, and some
# tokenizers 140.
MAX_RECORD_BYTES = 1 << 25
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
# what the decoder may stop before because the text ended within it
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
CUT_NUMBER_OR_ESCAPE = re.compile(r"\.|[eE][+-]?|u[0-9a-fA-F]{0,4}")
Value = tuple[int, bytes, str]


class JsonValues:
    """Iterates over the elements of an array, or over values one after another.

    Yields (line from 1, the value's bytes, ""), or (line, what follows, error) as the last if the next value is lost.
    """

    def __init__(self, head: bytes, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        # a byte that is not UTF-8 survives as a lone surrogate, and returns as itself in the value's bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.line = self.utf8.decode(head), 0, 1

    def __iter__(self) -> Iterator[Value]:
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

    def _value(self) -> Value:
        """The value that begins at the next character."""
        self._next_char()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                if not (is_cut(error) and self._more()):
                    raise _BrokenError(explain(error)) from error
        line = self.line
        return line, self._take(end).encode("utf-8", "surrogateescape"), ""

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
        raise _BrokenError(
            "expected ',' or ']' after an element of the array" if char else "the array is cut off: no ']'"
        )

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
            raise _BrokenError(f"a record of more than {MAX_RECORD_BYTES >> 20} MiB")
        while wanted > 0 and (chunk := next(self.chunks, b"")):
            parts.append(self.utf8.decode(chunk))
            wanted -= len(parts[-1])
        self.text, self.at = "".join(parts), 0
        return len(parts) > 1

    def _bad(self, error: str) -> Value:
        return self.line, self.text[self.at : self.at + 2000].encode("utf-8", "surrogateescape"), error


class _BrokenError(Exception):
    """The place of the next record is lost."""


def is_cut(error: Exception) -> bool:
    """True if the text may just be too short: its end was reached, not something wrong before it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].strip()
    return (
        error.msg.startswith("Unterminated string")
        or any(word.startswith(rest) for word in WORDS)
        or (CUT_NUMBER_OR_ESCAPE.fullmatch(rest) is not None)
    )


def explain(error: Exception) -> str:
    """What is wrong with the last text of a file."""
    if isinstance(error, json.JSONDecodeError) and is_cut(error):
        return f"not JSON, the record is cut off ({error.msg})"
    return wrong_at(error)


def wrong_at(error: Exception) -> str:
    """What is wrong with a text that is there as a whole, and where in its line."""
    if not isinstance(error, json.JSONDecodeError):
        return f"JSON that cannot be read: {error}"
    column = error.pos - error.doc.rfind("\n", 0, error.pos)
    near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return f"not JSON: {error.msg} (column {column}), near {near!r}"
