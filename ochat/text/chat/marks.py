"""Invisible marks that text carries through a chat template, to be found again in what the template writes.

    labels = []
    text = render(mark("Hi", ("content", 0), labels))       # "<user>" "Hi" "</user>", the mark's two ends around "Hi"
    text, found = take(text, labels)                        # "<user>Hi</user>", {("content", 0): [(6, 8)]}

A mark is two characters of Unicode's private plane 16, one on either side of the text, other ones for each text.
"""

from __future__ import annotations

import re

from ochat.errors import DataError

Stretch = tuple[int, int]  # characters from, up to
Label = tuple[str, int]  # what is marked, and its number: ("content", 0) is the first message's
Marks = dict[Label, list[Stretch]]  # where each marked text is found

GENERATED_ENDS = ("\U00100000", "\U00100001")  # the mark around what `{% generation %}` blocks write
GENERATED: Label = ("generated", 0)
_FIRST, _LAST = ord(GENERATED_ENDS[1]) + 1, 0x10FFFD
_END = re.compile(f"[{GENERATED_ENDS[0]}-{chr(_LAST)}]")


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


def take(text: str, labels: list[Label]) -> tuple[str, Marks]:
    """The text without marks, and where the marked texts are in it. Half a mark, as a cut leaves it, marks nothing."""
    parts: list[str] = []
    found: Marks = {}
    opened: dict[Label, int] = {}
    at = place = 0
    for end in _END.finditer(text):
        parts.append(text[at : end.start()])
        place += len(parts[-1])
        at = end.end()
        number, is_last = divmod(ord(end[0]) - _FIRST, 2)
        label = GENERATED if number < 0 else labels[number] if number < len(labels) else None
        if label is None:  # the template's own character
            continue
        if not is_last:
            opened[label] = place
        elif label in opened:
            found.setdefault(label, []).append((opened.pop(label), place))
    return "".join([*parts, text[at:]]), found
