"""Several attributes as one condition, as SteerLM (arXiv 2310.05344) has them.

    AttributeFormat().text({"verbosity": 1, "quality": 3}, "condition")      # "quality:3,verbosity:1"

A template says how each is written (its keys `attribute` and `attribute_separator`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ochat.errors import DataError
from ochat.text.fields import check_number, check_text, describe


@dataclass(frozen=True)
class AttributeFormat:
    """`each` holds {name} and {value} once; `separator` stands between two attributes."""

    each: str = "{name}:{value}"
    separator: str = ","

    def text(self, attributes: dict[str, Any], place: str) -> str:
        """The condition: attributes in the order of their names, so that their order in a record makes no other class.

        null is left out. Raises: DataError for a value that is no text and no number, and for one that holds the
        separator.
        """
        values = {name: value for name, value in sorted(attributes.items()) if value is not None}
        return self.separator.join(self.one(name, value, f"{place}.{name}") for name, value in values.items())

    def one(self, name: str, value: Any, place: str) -> str:
        """A single attribute. Raises: DataError."""
        said = _said(value, place)
        for word in (check_text(name, place), said):
            if not word.strip() or (self.separator.strip() and self.separator in word):
                raise DataError(f"{place}: {word!r} is blank or holds {self.separator!r}, which parts two attributes")
        return self.each.replace("{name}", name, 1).replace("{value}", said, 1)


def _said(value: Any, place: str) -> str:
    """The value in words: 3.0, as Parquet may make of 3, is 3."""
    if isinstance(value, str):
        return check_text(value, place)
    if not isinstance(value, bool | int | float):
        raise DataError(f"{place}: expected text or a number, got {describe(value)}")
    number = check_number(value, place)
    return json.dumps(int(number) if isinstance(value, float) and number.is_integer() else value)
