"""Read untrusted JSON with limits on size and depth, then its fields with their types checked.

record = read_object(Path("base/config.json"), ConfigError, "fetch it again")
fields = Fields(record, "base/config.json");  fields.integer("hidden_size")  # 64
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, OchatError

MAX_BYTES = 1 << 27  # the largest in use, tokenizers and manifests of thousands of files, have a third of it
MAX_DEPTH = 64  # below what Python's own reading, writing and printing of nested values can take
REQUIRED = object()  # as a default: the key must be there
MAX_INTEGER = (1 << 31) - 1  # of any whole number in a model's configuration; sizes have lower bounds of their own


def read_object(path: Path, error: type[OchatError], advice: str) -> dict[str, Any]:
    """The object in a file.

    Raises: FileNotFoundError; `error`, ending with `advice`, for a file that is too large, is not UTF-8 or JSON, is
    nested too deeply, or whose strings are not Unicode. Costs: at most some 25 bytes for each byte of the file.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise error(f"{path}: more than {MAX_BYTES >> 20} MiB; no such file of JSON is in use; {advice}")
    try:
        record = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # half of a surrogate pair: it can be neither printed nor written
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: damaged, or not valid JSON ({problem}); {advice}") from None
    if not isinstance(record, dict):
        raise error(f"{path}: a JSON object is expected, not {type(record).__name__}; {advice}")
    if _is_deeper(record, MAX_DEPTH):
        raise error(f"{path}: nested more than {MAX_DEPTH} levels deep; {advice}")
    return record


def shown(value: Any) -> str:
    """A value for error messages, shortened: an untrusted one may be of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


@dataclass(frozen=True)
class Fields:
    """Typed reads of one JSON object: a checked value, or a ConfigError that names file and key."""

    record: Mapping[str, Any]
    where: str  # the file, for messages

    def fail(self, key: str, problem: str) -> ConfigError:
        """The error to raise for `key`."""
        return ConfigError(f"{self.where}: {key}{problem}")

    def value(self, key: str, default: Any) -> Any:
        """The value, or the default where the key is missing or null."""
        found = self.record.get(key)
        if found is not None:
            return found
        if default is REQUIRED:
            raise self.fail(key, " is missing, and the model cannot be built without it")
        return default

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1, most: int = MAX_INTEGER) -> Any:
        """An int from `least` to `most` (bool is refused); the default is returned unchecked."""
        found = self.value(key, default)
        if found is default:
            return found
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise self.fail(key, f" is {shown(found)}; expected a whole number >= {least}")
        if found > most:
            raise self.fail(key, f" is {shown(found)}; no model has more than {most:,}")
        return found

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number > 0."""
        found = self.value(key, default)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if not is_number or not 0 < found < math.inf or (isinstance(found, int) and found > sys.float_info.max):
            raise self.fail(key, f" is {shown(found)}; expected a finite number > 0")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.fail(key, f" is {shown(found)}; expected true or false")
        return found


def _is_deeper(record: dict[str, Any], limit: int) -> bool:
    level: list[Any] = [record]
    for _ in range(limit):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for some in children for child in some if isinstance(child, dict | list)]
    return bool(level)
