"""The id of a conversation, `FILE:LINE`, and how a file of scores, weights or rewards is looked up by it.

    record_ids([("a.jsonl", 7), ("a.jsonl", 8), ("a.jsonl", 8)])                     # a.jsonl:7, a.jsonl:8, a.jsonl:8#2
    index = RecordIndex(["a.jsonl:7", "a.jsonl:8"], "rewards.jsonl")
    index.rows(index.matches(["/data/a.jsonl"])["/data/a.jsonl"], 8)                 # [1]

Why file and line: they are all that a data set keeps of where a conversation came from, every error message names them,
and they stay the same under another template, class, context, shard or held-out share. A record's own `id` is metadata
that many formats lack and that files repeat. `#2` is the second conversation of one record, which a map with several
answers makes. The price: lines must not move between scoring and preparing. Token weights are checked by their ids.

A file is the one of the same path, or, where data lies elsewhere by then, that which shares the most of its path's end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath

from ochat.errors import DataError


def record_ids(places: Iterable[tuple[str, int]]) -> list[str]:
    """The ids of conversations in order, those of one record one after another."""
    found: list[str] = []
    before, number = None, 0
    for place in places:
        number = number + 1 if place == before else 1
        before = place
        found.append(f"{place[0]}:{place[1]}" + (f"#{number}" if number > 1 else ""))
    return found


def split_id(text: str) -> tuple[str, int, int]:
    """File, line and number among the record's conversations, from 1. Raises: DataError."""
    file, _, tail = text.rpartition(":")
    line, _, number = tail.partition("#") if "#" in tail else (tail, "", "1")
    if not file or not (line.isdecimal() and number.isdecimal()):
        raise DataError(f"record_id: {text[:200]!r} is none; FILE:LINE is needed, as `ochat score` writes it")
    return file, int(line), int(number)


class RecordIndex:
    """Rows of a file by record. Raises: DataError for a text that is no id, and for an id that comes twice. Costs:
    about 300 bytes a record."""

    def __init__(self, ids: Sequence[str], source: str) -> None:
        self.source = source
        self._rows: dict[tuple[str, int], dict[int, int]] = {}
        for row, text in enumerate(ids):
            file, line, number = split_id(text)
            if self._rows.setdefault((file, line), {}).setdefault(number, row) != row:
                raise DataError(f"{source}: the record id {text} comes twice; keep one of them")
        self._files = list(dict.fromkeys(file for file, _ in self._rows))

    def matches(self, inputs: Iterable[str]) -> dict[str, str]:
        """Input file -> its name in this file. Raises: DataError for an input that is not there, and for one that
        several names, or several inputs, fit alike."""
        found: dict[str, str] = {}
        for name in inputs:
            best = self._match(name)
            if best in found.values():
                other = next(one for one, match in found.items() if match == best)
                raise DataError(f"{self.source}: {best} may be {other} or {name}; rename one, and score it again")
            found[name] = best
        return found

    def rows(self, file: str, line: int) -> list[int]:
        """The rows of a record's conversations, in the order of their numbers; none where the record is not there."""
        return [row for _, row in sorted(self._rows.get((file, line), {}).items())]

    def _match(self, name: str) -> str:
        common = {known: _shared(known, name) for known in self._files}
        most = max(common.values(), default=0)
        best = [known for known in self._files if common[known] == most]
        if name in common:
            return name
        if not most:
            has = ", ".join(self._files[:5]) or "none"
            raise DataError(f"{self.source}: no record of {name}; it has those of {has}")
        if len(best) > 1:
            raise DataError(f"{self.source}: {name} may be {' or '.join(best[:5])}; give the inputs by the same paths")
        return best[0]


def _shared(one: str, other: str) -> int:
    """How many parts at the ends of two paths are the same."""
    pairs = zip(reversed(PurePath(one).parts), reversed(PurePath(other).parts), strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(map(_depth, (one, other))))


def _depth(path: str) -> int:
    return len(PurePath(path).parts)
