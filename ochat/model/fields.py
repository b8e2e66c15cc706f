"""Typed reads from the record of a `config.json`: a checked value, or a ConfigError that names file and key.

fields = Fields({"hidden_size": 64}, "base/config.json");  fields.integer("hidden_size")  # 64
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ochat.errors import ConfigError

REQUIRED = object()  # as a default: the key must be there
MOST = (1 << 31) - 1  # of any whole number that a model has; sizes have lower bounds of their own


def shown(value: Any) -> str:
    """A value for messages, cut short: what it is not may be of any size, and nested as deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 100
    return short.repr(value)


@dataclass(frozen=True)
class Fields:
    """One JSON object and the name by which messages call it."""

    record: Mapping[str, Any]
    where: str

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

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1, most: int = MOST) -> Any:
        """An int from `least` to `most` (a bool is none); the default is returned unchecked."""
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
