"""Typed reads from the record of a `config.json`: a checked value, or a ConfigError that names file and key.

fields = Fields({"hidden_size": 64}, "base/config.json");  fields.integer("hidden_size")  # 64
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ochat.errors import ConfigError

REQUIRED = object()  # as a default: the key must be there


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

    def integer(self, key: str, default: Any = REQUIRED, least: int = 1) -> Any:
        """An int >= `least` (a bool is none); the default is returned unchecked."""
        found = self.value(key, default)
        if found is default:
            return found
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise self.fail(key, f" is {found!r}; expected a whole number >= {least}")
        return found

    def number(self, key: str, default: Any = REQUIRED) -> float:
        """A finite number > 0."""
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found) or found <= 0:
            raise self.fail(key, f" is {found!r}; expected a finite number > 0")
        return float(found)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.fail(key, f" is {found!r}; expected true or false")
        return found
