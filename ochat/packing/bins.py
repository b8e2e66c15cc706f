"""Numba kernels that assign a window's sequences to bins, longest first.

    # as even as possible, over the budget if need be
    bin_of = assign_balanced(lengths, extra, longest_first, num_bins, max_sequences, cost_priority)
    # as full as possible
    bin_of = first_fit_decreasing(lengths, longest_first, num_bins, budget, max_sequences)

lengths (n,) int32 tokens; longest_first (n,) the sequences in that order; max_sequences of a bin; bin_of (n,) int32,
UNASSIGNED for a sequence without room. Call each kernel from Python only: Numba's cache of a caller does not notice a
change of a kernel in another file.
"""

from __future__ import annotations

import numpy as np
from numba import njit

UNASSIGNED = -1
LAST_ROUNDS = 2  # in which sequences, short by then, make tokens even


@njit(cache=True, nogil=True)
def assign_balanced(lengths, extra, longest_first, num_bins, max_sequences, cost_priority):
    """Rounds of sequences of about one length, at most one for each bin that is not ahead by more than that.

    `extra` (n,) float32: cost beyond what the length explains. In a round the bin with the most of it so far gets the
    least; the last rounds give the emptiest bin the longest. `cost_priority`: tokens by which a bin counts as fuller
    for each unit of extra, less and less towards the end, so that short sequences fill a bin with a very long one.
    Holds up to num_bins * max_sequences sequences.
    """
    bin_of = np.full(len(lengths), UNASSIGNED, np.int32)
    counts = np.zeros(num_bins, np.int64)
    tokens = np.zeros(num_bins, np.int64)
    extras = np.zeros(num_bins, np.float32)
    level = np.empty(num_bins)
    done = 0
    while done < len(lengths):
        priority = cost_priority * (1 - done / len(lengths))
        least = np.inf
        for b in range(num_bins):
            level[b] = tokens[b] + priority * extras[b]
            if counts[b] < max_sequences:
                least = min(least, level[b])
        bins = np.flatnonzero((counts < max_sequences) & (level < least + lengths[longest_first[done]]))
        members = longest_first[done : done + len(bins)]
        if len(lengths) - done <= LAST_ROUNDS * num_bins:
            bins = bins[np.argsort(tokens[bins], kind="mergesort")]
        else:
            bins = bins[np.argsort(-extras[bins], kind="mergesort")]
            members = members[np.argsort(extra[members], kind="mergesort")]
        for place in range(len(members)):
            i, b = members[place], bins[place]
            bin_of[i] = b
            counts[b] += 1
            tokens[b] += lengths[i]
            extras[b] += extra[i]
        done += len(members)
    return bin_of


@njit(cache=True, nogil=True)
def first_fit_decreasing(lengths, longest_first, num_bins, budget, max_sequences):
    """Each into the first bin with room (first-fit decreasing), found in a tree of the largest room below each node."""
    leaves = 1
    while leaves < num_bins:
        leaves *= 2
    room = np.full(2 * leaves, -1, np.int64)
    room[leaves : leaves + num_bins] = budget
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    counts = np.zeros(num_bins, np.int64)
    bin_of = np.full(len(lengths), UNASSIGNED, np.int32)
    for i in longest_first:
        if room[1] < lengths[i]:
            continue
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        b = node - leaves
        bin_of[i] = b
        counts[b] += 1
        room[node] = -1 if counts[b] == max_sequences else room[node] - lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bin_of
