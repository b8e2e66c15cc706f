"""Conversations of a data set as they are trained: their tokens, span by span, with roles and own weights.

for shown in conversations(Path("data/train"), [0, 17]): shown.spans
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ochat.data import manifest
from ochat.data.store_writer import Sequences
from ochat.errors import DataError
from ochat.text.token_weights import ROLES, Span

if TYPE_CHECKING:
    from ochat.data.store import Shard


class Shown(NamedTuple):
    """One conversation of a data set."""

    index: int  # in the data set, from 0
    condition: str
    place: str  # file:line that it was read from
    reward: float | None
    input_ids: list[int]
    spans: list[Span]  # weights are the record's own, before those of classes and rewards


def count(folder: Path) -> tuple[int, dict[str, list[int]]]:
    """How many conversations a data set has, and the places of each class's. Raises: DataError."""
    class_names, shards = _open(folder)
    ids = np.concatenate([np.zeros(0, np.uint16), *(shard.class_ids() for shard in shards)])
    return len(ids), {name: np.flatnonzero(ids == number).tolist() for number, name in enumerate(class_names)}


def of_line(folder: Path, line: str) -> list[int]:
    """The places of conversations read from a line of the input, "12" or "chats.jsonl:12". Raises: DataError."""
    name, _, number = line.rpartition(":")
    if not number.isdecimal():
        raise DataError(f"--line {line}: a number is needed, or FILE:NUMBER")
    found, first = [], 0
    for shard in _open(folder)[1]:
        places = np.flatnonzero(shard["lines"] == int(number))
        files = {number for number, file in enumerate(shard.files) if f"/{file}".endswith(f"/{name}" if name else "")}
        found += [first + int(at) for at in places if int(shard["files"][at]) in files]
        first += len(shard)
    if not found:
        raise DataError(
            f"{folder}: no conversation from line {line}: look for it in rejects.jsonl, or in {folder.name}-held-out; "
            "or it was too long"
        )
    return found


def about(folder: Path) -> str:
    """How the data set was prepared, in a line."""
    found = manifest.read_together([folder])[0].manifest
    ignored = ", ".join(f"{key} in {count:,}" for key, count in found["counts"].get("ignored", {}).items())
    facts = [f"template {found['template']['name']}", f"context {found['context']:,}"]
    return " · ".join([*facts, *([f"ignored, as metadata: {ignored}"] if ignored else [])])


def conversations(folder: Path, indices: Sequence[int]) -> Iterator[Shown]:
    """The conversations at these places. Raises: DataError, also for a place that is not there."""
    class_names, shards = _open(folder)
    ends = np.cumsum([len(shard) for shard in shards])
    for index in indices:
        number = int(np.searchsorted(ends, index, side="right"))
        if index < 0 or number == len(shards):
            raise DataError(f"{folder}: no conversation {index}; it has {ends[-1] if len(ends) else 0}, from 0 on")
        shard = shards[number]
        yield _read(shard, index, int(index - (ends[number] - len(shard))), class_names)


def first_of(sequences: Sequences) -> Shown:
    """The first of conversations that are being prepared, which is the first of its data set."""
    columns = (sequences.span_ends[0], sequences.span_roles[0], sequences.span_weights[0])
    factors = sequences.span_factors[0] if sequences.span_factors else [1.0] * len(columns[0])
    spans = [
        Span(end, ROLES[role], _present(weight), factor=factor)
        for end, role, weight, factor in zip(*columns, factors, strict=True)
    ]
    place, reward = f"{sequences.files[0]}:{sequences.lines[0]}", _present(sequences.rewards[0])
    return Shown(0, sequences.conditions[0], place, reward, sequences.input_ids[0].tolist(), spans)


def _open(folder: Path) -> tuple[tuple[str, ...], list[Shard]]:
    from ochat.data import store  # which imports torch

    class_names, shards = store.open_sets({"": manifest.read_together([folder])})
    return class_names, shards[""]


def _read(shard: Shard, index: int, at: int, class_names: Sequence[str]) -> Shown:
    first, last = shard["offsets"][at : at + 2]
    return Shown(
        index,
        class_names[int(shard.class_ids(slice(at, at + 1))[0])],
        f"{shard.files[shard['files'][at]]}:{shard['lines'][at]}",
        _present(float(shard["rewards"][at])),
        shard["input_ids"][first:last].tolist(),
        shard.spans(at, class_names),
    )


def _present(number: float) -> float | None:
    return None if np.isnan(number) else number
