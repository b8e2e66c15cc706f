"""Read what a message says: text, or content parts, with weights for parts of it.

    read_parts([{"type": "text", "text": "No.", "weight": 0}, {"type": "text", "text": "Yes."}], "content", notes)
    # Content("No.\\nYes.", "", (WeightedSpan(0, 4, 0.0),))

Characters are code points of the whole content.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from ochat.errors import DataError
from ochat.text.conversation import WeightedSpan
from ochat.text.fields import check_list, check_number, check_object, describe, shorten
from ochat.text.records.keys import DETAIL, PART
from ochat.text.records.objects import Fields, Notes, read_fields

TEXT_PARTS = ("text", "input_text", "output_text")
REASONING_PARTS = ("thinking", "reasoning")


class Content(NamedTuple):
    """What a message says, and the weights of those parts that have one."""

    text: str
    reasoning: str = ""
    spans: tuple[WeightedSpan, ...] = ()


def read_parts(parts: list[Any], place: str, notes: Notes) -> Content:
    """The text parts joined by newlines, as servers do; so are those of reasoning. Raises: DataError."""
    text, thoughts, spans = "", [], []
    for i, value in enumerate(parts):
        part = {"text": value} if isinstance(value, str) else check_object(value, f"{place}[{i}]")
        try:
            kind, said, weight = _read_part(part, notes)
        except DataError as error:
            raise DataError(f"{place}[{i}].{error}") from None
        if kind in REASONING_PARTS:
            thoughts.append(said)
            continue
        start = len(text)
        text += f"{said}\n"  # the newline belongs to the part before it
        if weight is not None:
            spans.append(WeightedSpan(start, len(text), weight))
    text = text[:-1]
    cut = (span._replace(end=min(span.end, len(text))) for span in spans)
    return Content(text, "\n".join(thoughts), tuple(span for span in cut if span.end > span.start))


def _read_part(part: dict[str, Any], notes: Notes) -> tuple[str, str, float | None]:
    """Its type, its text, and its weight if it has one."""
    fields = read_fields(part, PART, notes)
    kind = fields.text("type") or "text"
    if kind not in TEXT_PARTS + REASONING_PARTS:
        said = f"parts of type {shorten(kind)!r} are not read; write text, tool_calls, or messages of the role tool"
        raise DataError(f"{fields.name('type')}: {said}")
    said = "reasoning" if kind in REASONING_PARTS and "reasoning" in fields else "text"
    text = fields.text(said, required=True)
    read = ("type", said) if kind in REASONING_PARTS else ("type", said, "weight", "trained")
    for meaning, name in fields.names.items():
        if meaning not in read:
            raise PART.refusal(name, f"it is not read in a part of type {kind}")
    return kind, text, fields.weight()


def read_spans(fields: Fields, length: int) -> list[WeightedSpan]:
    """The weighted spans of a message's content of `length` characters. Raises: DataError."""
    spans = []
    for i, value in enumerate(fields.list("spans")):
        place = f"{fields.name('spans')}[{i}]"
        values = check_list(value, place)
        if len(values) != 3:
            raise DataError(f"{place}: [start, end, weight] is needed, got {len(values)} values")
        spans.append(_span(values[0], values[1], check_number(values[2], place), length, place))
    for i, value in enumerate(fields.list("train_detail")):
        place = f"{fields.name('train_detail')}[{i}]"
        check_object(value, place)
        try:
            detail = read_fields(value, DETAIL, fields.notes)
            weight = detail.weight()
        except DataError as error:
            raise DataError(f"{place}.{error}") from None
        if weight is None:
            raise DataError(f"{place}.train: missing")
        start, last = (detail.values.get(meaning) for meaning in ("start", "last"))
        spans.append(_span(start, last, weight, length, place, last_is_in=1))
    return spans


def _span(start: Any, end: Any, weight: float, length: int, place: str, last_is_in: int = 0) -> WeightedSpan:
    for value in (start, end):  # 3.0 is what a list of Parquet makes of 3 beside a weight of 0.5
        if type(value) not in (int, float) or value != value // 1:
            raise DataError(f"{place}: {describe(value)} is no whole number")
    if not 0 <= start < end + last_is_in <= length:
        raise DataError(f"{place}: {describe(start)} to {describe(end)} is no part of {length} characters of content")
    return WeightedSpan(int(start), int(end) + last_is_in, weight)


def in_order(spans: list[WeightedSpan]) -> tuple[WeightedSpan, ...]:
    """The spans sorted. Raises: DataError if two overlap."""
    spans = sorted(spans)
    for one, other in pairwise(spans):
        if other.start < one.end:
            raise DataError(f"spans: two weights for character {other.start} of the content; they must not overlap")
    return tuple(spans)
