"""One record as a file holds it, and what is wrong with one that cannot be read.

Record("chats.jsonl", line, 1, b'{"messages": []}').value()

How a bad record is refused: rejected.py.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from ochat.errors import DataError
from ochat.text.fields import TWICE, place_of_twice, unique_keys
from ochat.text.records.keys import RECORD

# No conversation comes near; memory is bounded by it: parsed JSON takes up to 25 bytes for each of the text's, and some
# tokenizers 140.
MAX_RECORD_BYTES = 1 << 25
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
# what the decoder may stop before because the text ended within it
WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
CUT_NUMBER_OR_ESCAPE = re.compile(r"\.|[eE][+-]?|u[0-9a-fA-F]{0,4}")
DECODE_ONCE = "import json, sys; [print(json.loads(line)) for line in sys.stdin]"
UNWRAP = "import json, sys; [print(json.dumps(record)) for record in json.load(sys.stdin)[{}]]"
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
    condition: str = ""  # the class of the file's records that name none

    @property
    def location(self) -> str:
        return f"{self.file}:{self.line}"

    def value(self) -> dict[str, Any]:
        """The JSON object; for a list of messages, {"messages": the list}.

        Raises: DataError "file:line: what is wrong".
        """
        if self.error:
            raise DataError(f"{self.location}: {self.error}")
        try:
            text = self.data.decode("utf-8").lstrip("\ufeff")
            value = DECODER.decode(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.location}: {_not_utf8(error)}") from error
        except DataError as error:
            place = place_of_twice(text)
            raise DataError(f"{self.location}: {f'{place}: {TWICE}' if place else error}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.location}: {explain(error, self.is_last)}") from error
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {"messages": value}
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            raise DataError(f"{self.location}: the record is JSON text within JSON text; {self._remedy(DECODE_ONCE)}")
        if not isinstance(value, dict):
            raise DataError(f"{self.location}: a record must be a JSON object, not {type(value).__name__}")
        if self.is_last and self.number == 1 and (key := _wraps(value)):
            raise DataError(f"{self.location}: the records lie under {key!r}; {self._remedy(UNWRAP.format(repr(key)))}")
        return value

    def _remedy(self, program: str) -> str:
        return f"make JSON Lines of it: python -c {shlex.quote(program)} < {shlex.quote(self.file)} > NEW.jsonl"


def _wraps(value: dict[str, Any]) -> str:
    """The key under which an object that is no record holds a list of records, "" if there is none."""
    if any(key in RECORD.by_name for key in value):
        return ""
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    return lists[0] if len(lists) == 1 and any(key in RECORD.meanings for key in value[lists[0]][0]) else ""


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


def _not_utf8(error: UnicodeDecodeError) -> str:
    found = f"not UTF-8 at byte {error.start} of the record (0x{error.object[error.start]:02x})"
    return f"{found}: damaged, or text of Windows, of which iconv -f WINDOWS-1252 -t UTF-8 makes UTF-8"
