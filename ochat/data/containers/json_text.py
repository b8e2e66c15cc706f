"""The JSON text of one record: how large it may be, whether it is cut off, and what is wrong with it.

is_cut(error), explain(error, is_last=True)         # of what the decoder raises
"""

from __future__ import annotations

import json
import re

# No conversation comes near; memory is bounded by it: parsed JSON takes up to 25 bytes for each of the text's, and some
# tokenizers 140.
MAX_RECORD_BYTES = 1 << 25
# what the decoder may stop before because the text ended within it
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
CUT_NUMBER_OR_ESCAPE = re.compile(r"\.|[eE][+-]?|u[0-9a-fA-F]{0,4}")
Piece = tuple[int, bytes, str]  # line from 1, a record's bytes, ""; or line, what there is of it, why it cannot be read


def is_cut(error: Exception) -> bool:
    """True if the text may just be too short: its end was reached, not something wrong before it."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    rest = error.doc[error.pos :].strip()
    is_in_word = any(word.startswith(rest) for word in WORDS)
    return is_in_word or error.msg.startswith("Unterminated string") or bool(CUT_NUMBER_OR_ESCAPE.fullmatch(rest))


def explain(error: Exception, is_last: bool) -> str:
    """What is wrong with a text, and where in its line; the last one of a file may be cut off."""
    if not isinstance(error, json.JSONDecodeError):  # a number of thousands of digits; brackets nested thousandfold
        return f"JSON that cannot be read: {error}"
    if "\0" in error.doc and not error.doc.strip("\0 \t\r\n"):
        return "zero bytes in place of text; the file was not written to its end, or its disk lost them"
    if error.doc[error.pos :].startswith("\ufeff"):
        return (
            "a BOM in the middle of a line: files were joined without a line break between them; put one in front of it"
        )
    if re.match(r"\s*[\[{]+'", error.doc):
        return "Python's notation, not JSON: write records with json.dumps"
    if is_last and is_cut(error):
        return f"not JSON, the record is cut off ({error.msg})"
    column = error.pos - error.doc.rfind("\n", 0, error.pos)
    near = error.doc[max(error.pos - 20, 0) : error.pos + 20]
    return f"not JSON: {error.msg} (column {column}), near {near!r}"
