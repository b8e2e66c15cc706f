"""Compiled loops over the mapped shards of a data set: fill a batch, count what is supervised, check a shard.

    num_rows, weight_sum = fill_batch(table, shards, wholes, cu_seqlens, rule, *buffers)

One pass over a batch's documents, without the interpreter's lock, so that a loader's thread holds nobody up. A shard's
columns are reached by their addresses (`Table`): numba takes no list of arrays without copying it. All loops stand in
this one file, because a cached loop does not notice a change in another. weights.py and batch.py define what they
compute; the tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

RECORD, CLASSES, REWARD, NONE = range(4)  # where a weight comes from
FIRST, OFFSETS, SPAN_OFFSETS, SPAN_ENDS, SPAN_ROLES, SPAN_WEIGHTS, CLASS_IDS, REWARDS, CLASS_MAP, IDS, IS_WIDE = range(
    11
)
IGNORE_INDEX, PAD_ID = -100, 0  # batch.py's: a compiled loop keeps what a constant was when it was compiled
MAX_SPANS = 1 << 40  # for the shape of a view whose end only the file knows


class Rule(NamedTuple):
    """A WeightRule as the loops take it."""

    source: int  # RECORD ... NONE
    defaults: NDArray[np.float32]  # (roles,) own weight of a span that names none
    by_class: NDArray[np.float32]  # (classes,)
    beta: float
    is_mean: bool  # a span's weight is shared among its tokens


def _to_pointer(typing_context, address):
    """An address (int64) as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


_pointer: Callable[..., Any] = intrinsic(_to_pointer)


@njit(cache=True, nogil=True)
def span_weight(own, role, class_id, reward, num_tokens, rule):
    """Weight of a span's tokens, float32."""
    weight = np.float64(rule.defaults[role] if math.isnan(own) else own)
    if weight != 0:
        if rule.source == CLASSES:
            weight = math.copysign(1.0, weight) * rule.by_class[class_id]
        elif rule.source == REWARD:
            weight = math.copysign(1.0, weight) * math.exp((np.float64(reward) - 1) / rule.beta)
        elif rule.source == NONE:
            weight = 1.0
        if rule.is_mean:
            weight /= max(num_tokens, 1)
    return np.float32(weight)


@njit(cache=True, nogil=True)
def first_damaged(num_tokens, offsets, span_offsets, span_ends, span_roles, num_roles, class_ids, num_classes):
    """The first sequence of a shard whose tokens or spans do not lie where they must; -1: all do."""
    if offsets[0] != 0 or offsets[-1] != num_tokens or span_offsets[0] != 0 or span_offsets[-1] != len(span_ends):
        return 0
    for s in range(len(class_ids)):
        length = offsets[s + 1] - offsets[s]
        first, last = span_offsets[s], span_offsets[s + 1]
        if length < 1 or offsets[s + 1] > num_tokens or not 0 <= first < last <= len(span_ends):
            return s
        if class_ids[s] >= num_classes or span_ends[last - 1] != length:
            return s
        end = 0
        for i in range(first, last):
            if span_ends[i] < end or span_roles[i] >= num_roles:
                return s
            end = span_ends[i]
    return -1


@njit(cache=True, nogil=True)
def count_supervised(span_offsets, span_ends, span_roles, span_weights, class_ids, rewards, class_map, rule, counts):
    """Into `counts` (S,): labels of non-zero weight of a shard's sequences. A first token is nobody's label."""
    for s in range(len(class_ids)):
        class_id = class_map[class_ids[s]]
        total, begin = 0, 0
        for i in range(span_offsets[s], span_offsets[s + 1]):
            end = span_ends[i]
            if span_weight(span_weights[i], span_roles[i], class_id, rewards[s], end - begin, rule) != 0:
                total += end - max(begin, 1) if end > 1 else 0
            begin = end
        counts[s] = total


@njit(cache=True, nogil=True)
def fill_batch(table, shards, wholes, cu_seqlens, rule, ids, labels, weights, positions, rows, supervised_classes):
    """Fill the buffers (T,) of a batch; rows and supervised_classes hold (num_rows,) afterwards.

    table (P, 11) int64: a row per shard, as `IDS` ... name its columns; shards (S,): each document's row in it;
    wholes (S,): its place in the data set; cu_seqlens (D + 1,): what follows the S documents is padding.
    """
    num_rows, weight_sum = 0, 0.0
    for d in range(len(shards)):
        row = table[shards[d]]
        at = wholes[d] - row[FIRST]
        start, stop = cu_seqlens[d], cu_seqlens[d + 1]
        offset = carray(_pointer(row[OFFSETS]), (at + 2,), np.int64)[at]
        if row[IS_WIDE]:
            wide = carray(_pointer(row[IDS]), (offset + stop - start,), np.uint32)
            for t in range(stop - start):
                ids[start + t] = wide[offset + t]
        else:
            narrow = carray(_pointer(row[IDS]), (offset + stop - start,), np.uint16)
            for t in range(stop - start):
                ids[start + t] = narrow[offset + t]
        labels[start : stop - 1] = ids[start + 1 : stop]
        labels[stop - 1] = IGNORE_INDEX
        weights[start:stop] = 0
        in_shard = int(carray(_pointer(row[CLASS_IDS]), (at + 1,), np.uint16)[at])
        class_id = carray(_pointer(row[CLASS_MAP]), (in_shard + 1,), np.uint16)[in_shard]
        reward = carray(_pointer(row[REWARDS]), (at + 1,), np.float32)[at]
        span_offsets = carray(_pointer(row[SPAN_OFFSETS]), (at + 2,), np.int64)
        ends = carray(_pointer(row[SPAN_ENDS]), (MAX_SPANS,), np.int32)
        roles = carray(_pointer(row[SPAN_ROLES]), (MAX_SPANS,), np.uint8)
        own = carray(_pointer(row[SPAN_WEIGHTS]), (MAX_SPANS,), np.float32)
        begin = 0
        for i in range(span_offsets[at], span_offsets[at + 1]):
            end = ends[i]
            weight = span_weight(own[i], roles[i], class_id, reward, end - begin, rule)
            if weight != 0:
                for t in range(start + max(begin, 1) - 1, start + end - 1):
                    weights[t] = weight
                    rows[num_rows] = t
                    supervised_classes[num_rows] = class_id
                    num_rows += 1
                    weight_sum += abs(np.float64(weight))
            begin = end
    real = cu_seqlens[len(shards)]
    ids[real:] = PAD_ID
    labels[real:] = IGNORE_INDEX
    weights[real:] = 0
    for d in range(len(cu_seqlens) - 1):
        for t in range(cu_seqlens[d], cu_seqlens[d + 1]):
            positions[t] = t - cu_seqlens[d]
    return num_rows, weight_sum
