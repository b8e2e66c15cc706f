"""The public way to pack, written from its description: step by step over the shuffled stream, a step takes the most
sequences that a heuristic packs into its bins, found by bisection. `pack_public(..., "linear")` takes first-fit
decreasing and drops a last step that leaves bins empty; "quadratic" deals longest first to the emptiest bin (LPT).
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)
def _first_fit(lengths, num_bins, budget):
    """Bin of each, longest first into the first with room; the last is -1 where they do not fit."""
    bin_of = np.full(len(lengths), -1)
    room = np.full(num_bins, budget)
    for i in np.argsort(-lengths, kind="mergesort"):
        b = 0
        while b < num_bins and room[b] < lengths[i]:
            b += 1
        if b == num_bins:
            return False, bin_of
        bin_of[i] = b
        room[b] -= lengths[i]
    return True, bin_of


@njit(cache=True)
def _emptiest(lengths, num_bins, budget):
    """Bin of each, longest first into the emptiest."""
    bin_of = np.full(len(lengths), -1)
    emptiest = [(0, b) for b in range(num_bins)]
    for i in np.argsort(-lengths, kind="mergesort"):
        tokens, b = emptiest[0]
        if tokens + lengths[i] > budget:
            return False, bin_of
        bin_of[i] = b
        heapq.heapreplace(emptiest, (tokens + int(lengths[i]), b))
    return True, bin_of


def pack_public(
    lengths: NDArray, bins_per_step: int, budget: int, seed: int, variant: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(sequences bin by bin, bin offsets, steps); what the method drops is missing from the sequences."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    sums = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    members, counts, head = [], [], 0
    while head < len(order):
        most = int(np.searchsorted(sums, sums[head] + bins_per_step * budget, side="right")) - 1 - head
        fitting, bin_of = _most(lengths[order[head : head + most]], bins_per_step, budget, variant)
        in_bins = np.bincount(bin_of, minlength=bins_per_step)
        if variant == "linear" and (in_bins == 0).any():
            break
        members.append(order[head : head + fitting][np.argsort(bin_of, kind="stable")])
        counts.append(in_bins)
        head += fitting
    nothing = np.zeros(0, np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([nothing, *counts]))])
    return np.concatenate([nothing, *members]), offsets, len(counts)


def _most(stream: NDArray, num_bins: int, budget: int, variant: str) -> tuple[int, NDArray]:
    """The longest prefix of `stream`, which is all that the tokens allow, that fits: by bisection; and its bins."""
    pack = _first_fit if variant == "linear" else _emptiest
    failed = len(stream) + 1
    fitting, best = 0, np.zeros(0, np.int64)
    while fitting + 1 < failed:
        tried = (fitting + failed) // 2
        fits, bin_of = pack(stream[:tried].astype(np.int64), num_bins, budget)
        if fits:
            fitting, best = tried, bin_of
        else:
            failed = tried
    return fitting, best
