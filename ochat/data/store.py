"""Read the shards of prepared data sets through memory maps, which all processes share.

    class_names, opened = open_sets({"chat": manifest.read_together([Path("data/train")])})
    input_ids, loss_weights, class_ids = opened["chat"][0].read(np.array([3, 5]), rule)

A shard is a safetensors file, written by store_writer.py. For its S sequences of T tokens and N spans (a span is a run
of tokens with one role and one weight) it holds:

    input_ids    (T,)   uint16 or uint32     offsets      (S+1,) int64
    span_offsets (S+1,) int64                span_ends    (N,)   int32, exclusive, within the sequence
    span_roles   (N,)   uint8                span_weights (N,)   float32, NaN where the record gives none
    class_ids    (S,)   uint16               rewards      (S,)   float32, NaN where the record gives none
    lines        (S,)   int64                files        (S,)   uint16
    span_prefixes  (N,) uint8, which prefix that carries a condition the span is (text/prefixes.py); older sets lack it
    span_class_ids (N,) uint16, absent where each is the sequence's
    span_factors (N,)   float32, only with --token-weights: what multiplies the weight that a span gets

Opening reads headers, offsets and spans, to refuse a damaged file early; it never reads token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ochat.data import manifest
from ochat.data.manifest import AGAIN, Prepared
from ochat.data.weights import FACTORS, ROLES, WeightRule, own_weights
from ochat.errors import DataError
from ochat.files.safetensors_file import open_file
from ochat.text.chat.plain import NUM_PREFIXES
from ochat.text.prefixes import OWN, PrefixTable
from ochat.text.token_weights import Span

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
OPTIONAL = {"span_prefixes": ("uint8", "N"), "span_class_ids": ("uint16", "N"), FACTORS: ("float32", "N")}
BLOCK = 1 << 14  # sequences that one pass over a shard looks at together: what it holds stays small


@dataclass(frozen=True, eq=False)
class Shard:
    """One file, and what its numbers of classes and input files mean."""

    path: Path
    columns: dict[str, NDArray]
    class_map: NDArray[np.uint16]  # the shard's class id -> its place among the classes of all shards
    files: Sequence[str]  # the shard's input files by number
    prefixes: PrefixTable | None  # None: it does not say where they are
    context: int  # most tokens of a sequence

    def __len__(self) -> int:
        return len(self.columns["class_ids"])

    def __getitem__(self, name: str) -> NDArray:
        return self.columns[name]

    def lengths(self) -> NDArray[np.int64]:
        """(S,) tokens of each sequence."""
        return np.diff(self["offsets"])

    def lengths_under(self, at: NDArray[np.integer], under: NDArray[np.integer]) -> NDArray[np.int64]:
        """(n,) tokens of the sequences `at`, each `under` OWN conditions, NONE or a class of all shards that has
        prefixes. What longer prefixes push out of the context is cut off, as prepare does."""
        return np.minimum(self.uncut_lengths_under(at, under), self.context)

    def uncut_lengths_under(self, at: NDArray[np.integer], under: NDArray[np.integer]) -> NDArray[np.int64]:
        """The same, whatever the context."""
        lengths = self["offsets"][at + 1] - self["offsets"][at]
        changed = np.flatnonzero(under != OWN)
        for first, last in _blocks(len(changed)):
            chosen = changed[first:last]
            index, counts = self._places(at[chosen])
            starts = np.cumsum(counts) - counts
            ends, numbers = self["span_ends"][index], self["span_prefixes"][index]
            own = ends - _begins(ends, starts)
            now = np.where(numbers > 0, self.table.counts[numbers, np.repeat(under[chosen], counts)], own)
            assert (now >= 0).all(), "check_exchangeable refuses classes that a data set does not have"
            lengths[chosen] += np.add.reduceat(now - own, starts)
        return lengths

    @property
    def table(self) -> PrefixTable:
        """The ids of prefixes under every class."""
        assert self.prefixes is not None, "ConditionDraws asks for none where no prefix can be exchanged"
        return self.prefixes

    @property
    def has_turn_classes(self) -> bool:
        """Whether a message may have another class than its conversation."""
        return "span_class_ids" in self.columns

    def class_ids(self, at: NDArray | slice = slice(None)) -> NDArray[np.uint16]:
        """Places among the classes of all shards, of the sequences `at`."""
        return self.class_map[self["class_ids"][at]]

    def _span_class_ids(
        self, at: NDArray[np.integer], index: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.uint16]:
        """(n,) the same of the spans of the sequences `at`, each of its message; `index` and `counts`: their
        _places."""
        if not self.has_turn_classes:
            return np.repeat(self.class_ids(at), counts)
        return self.class_map[self["span_class_ids"][index]]

    def holds_class(self, class_id: int) -> NDArray[np.bool_]:
        """(S,) whether a sequence, or any message of it with a weight, is of this class, a place among those of all
        shards."""
        if not self.has_turn_classes:
            return self.class_ids() == class_id
        of_spans = (self.class_map[self["span_class_ids"]] == class_id) & self._are_trained(slice(None))
        return np.logical_or.reduceat(of_spans, self["span_offsets"][:-1])

    def classes_of(self, at: NDArray[np.integer]) -> NDArray[np.uint16]:
        """The classes of the messages with a weight in the sequences `at`, each once."""
        index, counts = self._places(at)
        return np.unique(self._span_class_ids(at, index, counts)[self._are_trained(index)])

    def _places(self, at: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the spans of the sequences `at` (n,) are, one after another, and how many each has."""
        first = self["span_offsets"][at]
        counts = self["span_offsets"][at + 1] - first
        return ranges(first, counts), counts

    def _are_trained(self, spans: NDArray | slice) -> NDArray[np.bool_]:
        return own_weights(self["span_weights"][spans], self["span_roles"][spans]) != 0

    def read(self, at: NDArray[np.integer], rule: WeightRule, under: NDArray[np.integer] | None = None) -> Tokens:
        """The tokens of the sequences `at` (n,), one after another, each `under` these conditions (None: its own)."""
        starts, ends = self["offsets"][at], self["offsets"][at + 1]
        spans = self._spans(at, rule)
        counts = spans.ends - spans.begins
        if under is None or (under == OWN).all():
            ids = self["input_ids"][ranges(starts, ends - starts)]
        else:
            ids, counts = self._exchanged(starts, spans, under)
        return Tokens(ids, np.repeat(spans.loss_weights, counts), np.repeat(spans.class_ids, counts))

    def _exchanged(
        self, starts: NDArray[np.integer], spans: _Spans, under: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of spans, of which prefixes have those `under` other conditions, and the tokens of each span."""
        numbers, classes = self["span_prefixes"][spans.index], np.repeat(under, spans.counts)
        are_own = (numbers == 0) | (classes == OWN)
        counts = np.where(are_own, spans.ends - spans.begins, self.table.counts[numbers, classes])
        ends = np.cumsum(counts)
        ends -= np.repeat(ends[spans.starts] - counts[spans.starts], spans.counts)  # within the sequence
        counts = np.minimum(ends, self.context) - np.minimum(ends - counts, self.context)
        ids, begins = np.empty(counts.sum(), np.int64), np.cumsum(counts) - counts
        for which, source, firsts in (
            (are_own, self["input_ids"], np.repeat(starts, spans.counts) + spans.begins),
            (~are_own, self.table.ids, self.table.starts[numbers, classes]),
        ):
            ids[ranges(begins[which], counts[which])] = source[ranges(firsts[which], counts[which])]
        return ids, counts

    def count_labels(
        self, rule: WeightRule, are_counted: Callable[[NDArray[np.float32]], NDArray]
    ) -> NDArray[np.int32]:
        """(S,) labels whose weights are counted; the first token of a sequence is never a label."""
        counts = np.empty(len(self), np.int32)
        for first, last in _blocks(len(self)):
            spans = self._spans(np.arange(first, last), rule)
            chosen = are_counted(spans.loss_weights)
            counts[first:last] = _count_labels(spans.begins, spans.ends, chosen, spans.starts)
        return counts

    def spans(self, at: int, class_names: Sequence[str]) -> list[Span]:
        """The stretches of sequence `at`, each of one role, class and weight. `class_names`: of all shards."""
        held = slice(int(self["span_offsets"][at]), int(self["span_offsets"][at + 1]))
        columns = (self[name][held].tolist() for name in ("span_ends", "span_roles", "span_weights"))
        spans = [
            Span(end, ROLES[role], None if math.isnan(weight) else weight)
            for end, role, weight in zip(*columns, strict=True)
        ]
        if self.has_turn_classes:
            numbers = self.class_map[self["span_class_ids"][held]].tolist()
            spans = [span._replace(condition=class_names[i]) for span, i in zip(spans, numbers, strict=True)]
        if FACTORS in self.columns:
            spans = [span._replace(factor=x) for span, x in zip(spans, self[FACTORS][held].tolist(), strict=True)]
        return spans

    def _spans(self, at: NDArray[np.integer], rule: WeightRule) -> _Spans:
        index, counts = self._places(at)
        starts = np.cumsum(counts) - counts
        ends = self["span_ends"][index]
        begins = _begins(ends, starts)
        class_ids = self._span_class_ids(at, index, counts)
        rewards = np.repeat(self["rewards"][at], counts)
        own, roles, num_tokens = self["span_weights"][index], self["span_roles"][index], ends - begins
        if rule.per_message_mean:
            num_tokens = _of_messages(num_tokens, roles, starts)
        elif rule.per_conversation_mean and len(starts):
            # a class may weigh 0, but never decides which labels are supervised: the record's own weights do
            num_tokens = np.repeat(_count_labels(begins, ends, own_weights(own, roles) != 0, starts), counts)
        factors = self[FACTORS][index] if FACTORS in self.columns else None
        weights = rule(own, roles, class_ids, rewards, num_tokens, factors)
        return _Spans(index, counts, begins, ends, weights, class_ids, starts)


class Tokens(NamedTuple):
    """The T tokens of some sequences, one after another, unshifted."""

    input_ids: NDArray  # (T,) as the shard has them
    loss_weights: NDArray[np.float32]  # (T,)
    class_ids: NDArray[np.uint16]  # (T,) of the token's message, places among the classes of all shards


class _Spans(NamedTuple):
    """The n spans of some sequences, one after another."""

    index: NDArray[np.int64]  # (n,) places in the shard's columns of spans
    counts: NDArray[np.int64]  # of each sequence: its spans
    begins: NDArray[np.int32]  # (n,) within the sequence, as are ends
    ends: NDArray[np.int32]  # (n,)
    loss_weights: NDArray[np.float32]  # (n,)
    class_ids: NDArray[np.uint16]  # (n,) places among the classes of all shards
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
    described = one.manifest.get("prefixes", {})
    table = PrefixTable.of(described, list(class_ids)) if "ids" in described and "span_prefixes" in columns else None
    return Shard(
        path, columns, np.array([class_ids[name] for name in classes], np.uint16), files, table, one.manifest["context"]
    )


def _find_damage(columns: dict[str, NDArray], num_classes: int) -> str:
    """What is wrong with a shard; "" if the tokens, spans and class of every sequence lie within it."""
    expected = COLUMNS | {name: kind for name, kind in OPTIONAL.items() if name in columns}
    for name, (types, _) in expected.items():
        if name not in columns or str(columns[name].dtype) not in types.split(" or ") or columns[name].ndim != 1:
            return f"its column {name} is no list of {types}"
    num_sequences, num_spans, num_tokens = (len(columns[name]) for name in ("class_ids", "span_ends", "input_ids"))
    lengths = {"T": num_tokens, "N": num_spans, "S": num_sequences, "S+1": num_sequences + 1}
    for name, (_, letter) in expected.items():
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
    if "span_class_ids" in columns:
        is_wrong |= columns["span_class_ids"][spans] >= num_classes
    if "span_prefixes" in columns:
        is_wrong |= columns["span_prefixes"][spans] > NUM_PREFIXES
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
