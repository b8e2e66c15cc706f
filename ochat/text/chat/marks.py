"""Invisible marks that text carries through a chat template, to be found again in what the template writes.

    labels = []
    text = render(mark("Hi", ("content", 0), labels))       # "<user>" "Hi" "</user>", the mark's two ends around "Hi"
    take(text, labels)                                      # "<user>Hi</user>", {("content", 0): [(6, 8)]}, none lost

A mark is two characters of Unicode's private plane 16, one on either side of the text, other ones for each text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ochat.errors import DataError

Stretch = tuple[int, int]  # characters from, up to
Label = tuple[str, int]  # what is marked, and its number: ("content", 0) is the first message's

GENERATED_ENDS = ("\U00100000", "\U00100001")  # the mark around what `{% generation %}` blocks write
GENERATED: Label = ("generated", 0)
_FIRST, _LAST = ord(GENERATED_ENDS[1]) + 1, 0x10FFFD
_END = re.compile(f"[{GENERATED_ENDS[0]}-{chr(_LAST)}]")


class Written(NamedTuple):
    """What a chat template wrote: its text without marks, and the record's texts in it."""

    text: str
    places: dict[Label, list[Stretch]]
    lost: list[Label]  # of marked texts that it does not hold

    def lost_of(self, kind: str) -> list[int]:
        """The numbers of this kind that are lost."""
        return [number for each, number in self.lost if each == kind]


def mark(text: str, label: Label, labels: list[Label]) -> str:
    """The text with a mark around it, but for blanks at its ends, which templates may trim. Blank text gets none.

    `labels` gets the label; its place there says which mark is meant. Raises: DataError.
    """
    core = text.strip()
    if not core:
        return text
    if _END.search(core):
        raise DataError(f"{label[0]}: characters of the private plane 16, which cannot go through a chat template")
    first = _FIRST + 2 * len(labels)
    if first >= _LAST:
        raise DataError("items: too many messages for a chat template")
    labels.append(label)
    start = text.index(core)
    return f"{text[:start]}{chr(first)}{core}{chr(first + 1)}{text[start + len(core) :]}"


def take(text: str, labels: list[Label]) -> Written:
    """The text without marks, and where the marked texts are in it. Half a mark, as a cut leaves it, marks nothing."""
    parts: list[str] = []
    places: dict[Label, list[Stretch]] = {}
    opened: dict[int, int] = {}  # mark -> where it begins
    lost = set(range(len(labels)))
    at = place = 0
    for end in _END.finditer(text):
        parts.append(text[at : end.start()])
        place += len(parts[-1])
        at = end.end()
        number, is_last = divmod(ord(end[0]) - _FIRST, 2)
        if number >= len(labels):  # the template's own character
            continue
        if not is_last:
            opened[number] = place
        elif number in opened:
            places.setdefault(GENERATED if number < 0 else labels[number], []).append((opened.pop(number), place))
            lost.discard(number)
    return Written("".join([*parts, text[at:]]), places, [labels[number] for number in sorted(lost)])
