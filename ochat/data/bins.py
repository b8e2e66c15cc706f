"""Compiled loops of the packer: put sequences into a given number of bins, or fail.

    fits, bin_of = pack_lpt(sizes, num_bins, budget, limit)

sizes (n,) int64 tokens; budget tokens and limit sequences per bin at most; bin_of (n,) int64, NOWHERE where it failed.
"""

from __future__ import annotations

import heapq

import numpy as np
from numba import njit
from numpy.typing import NDArray

NOWHERE = -1


@njit(cache=True)
def pack_lpt(sizes: NDArray[np.int64], num_bins: int, budget: int, limit: int) -> tuple[bool, NDArray[np.int64]]:
    """Longest first, each into the emptiest bin."""
    bin_of = np.full(len(sizes), NOWHERE)
    counts = np.zeros(num_bins, np.int64)
    emptiest = [(0, b) for b in range(num_bins)]
    for i in np.argsort(-sizes, kind="mergesort"):
        if len(emptiest) == 0 or emptiest[0][0] + sizes[i] > budget:
            return False, bin_of
        tokens, b = emptiest[0]
        bin_of[i] = b
        counts[b] += 1
        heapq.heappop(emptiest)
        if counts[b] < limit:
            heapq.heappush(emptiest, (tokens + int(sizes[i]), b))
    return True, bin_of


@njit(cache=True)
def pack_ffd(sizes: NDArray[np.int64], num_bins: int, budget: int, limit: int) -> tuple[bool, NDArray[np.int64]]:
    """Longest first, each into the first bin with room, found in a tree of the largest room below each node."""
    leaves = 1
    while leaves < num_bins:
        leaves *= 2
    room = np.full(2 * leaves, -1)
    room[leaves : leaves + num_bins] = budget
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    counts = np.zeros(num_bins, np.int64)
    bin_of = np.full(len(sizes), NOWHERE)
    for i in np.argsort(-sizes, kind="mergesort"):
        if room[1] < sizes[i]:
            return False, bin_of
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= sizes[i] else 2 * node + 1
        b = node - leaves
        bin_of[i] = b
        counts[b] += 1
        room[node] = -1 if counts[b] == limit else room[node] - sizes[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return True, bin_of


@njit(cache=True)
def even_costs(bin_of, sizes, costs, bins_per_step, budget, limit):
    """Deal each step's sequences out again by cost; a step keeps its bins unless that fits and is more even."""
    result = bin_of.copy()
    order = np.argsort(bin_of // bins_per_step, kind="mergesort")
    begin = 0
    while begin < len(order):
        step = bin_of[order[begin]] // bins_per_step
        end = begin
        while end < len(order) and bin_of[order[end]] // bins_per_step == step:
            end += 1
        members = order[begin:end]
        before = np.zeros(bins_per_step)
        for i in members:
            before[bin_of[i] - step * bins_per_step] += costs[i]
        largest, dealt = _deal_by_cost(sizes[members], costs[members], bins_per_step, budget, limit)
        if largest < before.max():
            result[members] = step * bins_per_step + dealt
        begin = end
    return result


@njit(cache=True)
def _deal_by_cost(sizes, costs, num_bins, budget, limit):
    """Costliest first, each into the cheapest bin with room: the largest bin's cost (inf: no room) and the bins."""
    bin_of = np.full(len(sizes), NOWHERE)
    tokens = np.zeros(num_bins, np.int64)
    counts = np.zeros(num_bins, np.int64)
    cheapest = [(0.0, b) for b in range(num_bins)]
    largest = 0.0
    for i in np.argsort(-costs, kind="mergesort"):
        passed = [(0.0, 0) for _ in range(0)]
        while len(cheapest) > 0 and tokens[cheapest[0][1]] + sizes[i] > budget:
            passed.append(heapq.heappop(cheapest))
        if len(cheapest) == 0:
            return np.inf, bin_of
        cost, b = heapq.heappop(cheapest)
        bin_of[i] = b
        tokens[b] += sizes[i]
        counts[b] += 1
        largest = max(largest, cost + costs[i])
        if counts[b] < limit:
            passed.append((cost + costs[i], b))
        for entry in passed:
            heapq.heappush(cheapest, entry)
    return largest, bin_of
