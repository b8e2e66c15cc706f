"""Read the shards of prepared data sets through memory maps, which all processes share.

    class_names, opened = open_sets({"chat": manifest.read_together([Path("data/train")])})
    input_ids, loss_weights = opened["chat"][0].read(np.array([3, 5]), rule)

A shard is a safetensors file, written by store_writer.py. For its S sequences of T tokens and N spans (a span is a run
of tokens with one role and one weight) it holds:

    input_ids    (T,)   uint16 or uint32     offsets      (S+1,) int64
    span_offsets (S+1,) int64                span_ends    (N,)   int32, exclusive, within the sequence
    span_roles   (N,)   uint8                span_weights (N,)   float32, NaN where the record gives none
    class_ids    (S,)   uint16               rewards      (S,)   float32, NaN where the record gives none
    lines        (S,)   int64                files        (S,)   uint16

Opening reads headers, offsets and spans, to refuse a damaged file early; it never reads token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ochat.data import manifest
from ochat.data.manifest import AGAIN, Prepared
from ochat.data.weights import ROLES, WeightRule, own_weights
from ochat.errors import DataError
from ochat.files.safetensors_file import open_file

COLUMNS = {  # name -> types, length by the letters above
    "input_ids": ("uint16 or uint32", "T"),
    "offsets": ("int64", "S+1"),
    "span_offsets": ("int64", "S+1"),
    "span_ends": ("int32", "N"),
    "span_roles": ("uint8", "N"),
    "span_weights": ("float32", "N"),
    "class_ids": ("uint16", "S"),
    "rewards": ("float32", "S"),
    "lines": ("int64", "S"),
    "files": ("uint16", "S"),
}
BLOCK = 1 << 14  # sequences that one pass over a shard looks at together: what it holds stays small


@dataclass(frozen=True, eq=False)
class Shard:
    """One file, and what its numbers of classes and input files mean."""

    path: Path
    columns: dict[str, NDArray]
    class_map: NDArray[np.uint16]  # the shard's class id -> its place among the classes of all shards
    files: Sequence[str]  # the shard's input files by number

    def __len__(self) -> int:
        return len(self.columns["class_ids"])

    def __getitem__(self, name: str) -> NDArray:
        return self.columns[name]

    def lengths(self) -> NDArray[np.int64]:
        """(S,) tokens of each sequence."""
        return np.diff(self["offsets"])

    def class_ids(self, at: NDArray | slice = slice(None)) -> NDArray[np.uint16]:
        """Places among the classes of all shards, of the sequences `at`."""
        return self.class_map[self["class_ids"][at]]

    def read(self, at: NDArray[np.integer], rule: WeightRule) -> tuple[NDArray, NDArray[np.float32]]:
        """Ids and loss weights, unshifted, of the sequences `at` (n,), one after another."""
        starts, ends = self["offsets"][at], self["offsets"][at + 1]
        spans = self._spans(at, rule)
        ids = self["input_ids"][ranges(starts, ends - starts)]
        return ids, np.repeat(spans.loss_weights, spans.ends - spans.begins)

    def count_supervised(self, rule: WeightRule) -> NDArray[np.int32]:
        """(S,) labels of non-zero weight; the first token of a sequence is never a label."""
        counts = np.empty(len(self), np.int32)
        for first, last in _blocks(len(self)):
            spans = self._spans(np.arange(first, last), rule)
            counts[first:last] = _count_labels(spans.begins, spans.ends, spans.loss_weights != 0, spans.starts)
        return counts

    def _spans(self, at: NDArray[np.integer], rule: WeightRule) -> _Spans:
        first, last = self["span_offsets"][at], self["span_offsets"][at + 1]
        counts = last - first
        index, starts = ranges(first, counts), np.cumsum(counts) - counts
        ends = self["span_ends"][index]
        begins = _begins(ends, starts)
        class_ids, rewards = np.repeat(self.class_ids(at), counts), np.repeat(self["rewards"][at], counts)
        own, roles, num_tokens = self["span_weights"][index], self["span_roles"][index], ends - begins
        if rule.per_message_mean:
            num_tokens = _of_messages(num_tokens, roles, starts)
        elif rule.per_conversation_mean and len(starts):
            # class and reward weigh a whole conversation: its own weights say which labels are supervised
            num_tokens = np.repeat(_count_labels(begins, ends, own_weights(own, roles) != 0, starts), counts)
        return _Spans(begins, ends, rule(own, roles, class_ids, rewards, num_tokens), starts)


class _Spans(NamedTuple):
    """The n spans of some sequences, one after another."""

    begins: NDArray[np.int32]  # (n,) within the sequence, as are ends
    ends: NDArray[np.int32]  # (n,)
    loss_weights: NDArray[np.float32]  # (n,)
    starts: NDArray[np.int64]  # of each sequence: the place of its first span


def _count_labels(
    begins: NDArray[np.int32], ends: NDArray[np.int32], chosen: NDArray[np.bool_], starts: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Labels in the chosen ones of n spans, of each sequence; its first token is never a label."""
    return np.add.reduceat(np.where(chosen, np.maximum(ends, 1) - np.maximum(begins, 1), 0), starts)


def _of_messages(
    num_tokens: NDArray[np.integer], roles: NDArray[np.uint8], starts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(n,) tokens of the message that each span is part of: spans of one role that follow each other, which differ in
    weight. `starts`: the places of the sequences' first spans."""
    if not len(roles):
        return num_tokens.astype(np.int64)
    is_first = np.concatenate([[True], roles[1:] != roles[:-1]])
    is_first[starts] = True
    firsts = np.flatnonzero(is_first)
    return np.repeat(np.add.reduceat(num_tokens, firsts), np.diff(np.append(firsts, len(roles))))


def open_sets(sets: Mapping[str, Sequence[Prepared]]) -> tuple[tuple[str, ...], dict[str, list[Shard]]]:
    """The classes of all data sets together, and the shards of each.

    Raises DataError for a file that is missing, has another size than was written, or whose columns do not fit
    together.
    """
    classes = dict.fromkeys(name for folders in sets.values() for one in folders for name in one.manifest["classes"])
    class_ids = {name: number for number, name in enumerate(classes)}
    return tuple(class_ids), {
        name: [_open(one, entry, class_ids) for one in folders for entry in one.manifest["shards"]]
        for name, folders in sets.items()
    }


def ranges(starts: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """start, start + 1, ... of each start, as many as its count: ranges([5, 9], [2, 1]) is [5, 6, 9]."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _open(one: Prepared, entry: dict[str, Any], class_ids: dict[str, int]) -> Shard:
    """One shard, whose classes have their places in `class_ids`."""
    classes, files = manifest.names(one.manifest, entry)
    path = manifest.file_path(one.folder, entry)
    columns = {name: tensor.read().numpy() for name, tensor in open_file(path, DataError, AGAIN).items()}  # mapped
    if problem := _find_damage(columns, len(classes)):
        raise DataError(f"{path}: damaged ({problem}): {AGAIN}")
    return Shard(path, columns, np.array([class_ids[name] for name in classes], np.uint16), files)


def _find_damage(columns: dict[str, NDArray], num_classes: int) -> str:
    """What is wrong with a shard; "" if the tokens, spans and class of every sequence lie within it."""
    for name, (types, _) in COLUMNS.items():
        if name not in columns or str(columns[name].dtype) not in types.split(" or ") or columns[name].ndim != 1:
            return f"its column {name} is no list of {types}"
    num_sequences, num_spans, num_tokens = (len(columns[name]) for name in ("class_ids", "span_ends", "input_ids"))
    lengths = {"T": num_tokens, "N": num_spans, "S": num_sequences, "S+1": num_sequences + 1}
    for name, (_, letter) in COLUMNS.items():
        if len(columns[name]) != lengths[letter]:
            return f"{name} has {len(columns[name])} entries, not {lengths[letter]}"
    for name, total in (("offsets", num_tokens), ("span_offsets", num_spans)):
        if columns[name][0] != 0 or columns[name][-1] != total:
            return f"{name} does not run from 0 to {total}"
    for first, last in _blocks(num_sequences):
        wrong = np.flatnonzero(_are_damaged(columns, slice(first, last), num_classes))
        if len(wrong):
            return f"sequence {first + wrong[0]} lies outside its columns"
    return ""


def _are_damaged(columns: dict[str, NDArray], block: slice, num_classes: int) -> NDArray[np.bool_]:
    """Of each sequence of a block, whether its tokens, spans or class lie outside the shard."""
    offsets, span_offsets = (columns[name][block.start : block.stop + 1] for name in ("offsets", "span_offsets"))
    damaged = columns["class_ids"][block] >= num_classes
    for steps, total in ((offsets, len(columns["input_ids"])), (span_offsets, len(columns["span_ends"]))):
        is_inside = (steps >= 0) & (steps <= total)  # else a difference could overflow
        damaged |= ~(is_inside[:-1] & is_inside[1:]) | (np.diff(steps) < 1)
    if damaged.any():
        return damaged
    spans = slice(span_offsets[0], span_offsets[-1])
    ends, starts = columns["span_ends"][spans], span_offsets[:-1] - span_offsets[0]
    is_wrong = (ends < _begins(ends, starts)) | (columns["span_roles"][spans] >= len(ROLES))
    return np.logical_or.reduceat(is_wrong, starts) | (ends[span_offsets[1:] - 1 - span_offsets[0]] != np.diff(offsets))


def _begins(ends: NDArray[np.int32], starts: NDArray[np.integer]) -> NDArray[np.int32]:
    """Where spans begin that follow one another; those at `starts` are the first of their sequences."""
    begins = np.empty_like(ends)
    begins[1:] = ends[:-1]
    begins[starts] = 0
    return begins


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, BLOCK):
        yield first, min(first + BLOCK, count)
