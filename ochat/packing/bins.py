"""Compiled loops of the packer that put a window's sequences into bins, longest first.

    bin_of = deal_evenly(lengths, extra, longest_first, num_bins, limit, lead)       as even as it gets, budget or not
    bin_of = pack_tightly(lengths, longest_first, num_bins, budget, limit)           as full as it gets

lengths (n,) int32 tokens; longest_first (n,) the sequences in that order; limit sequences per bin at most; bin_of (n,)
int32, NOWHERE for a sequence that found no room. Each loop is called from Python only: Numba's cache of a caller would
not notice that a loop of another file has changed.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NOWHERE = -1
LAST_ROUNDS = 2  # in which sequences, short by then, make tokens even


@njit(cache=True, nogil=True)
def deal_evenly(lengths, extra, longest_first, num_bins, limit, lead):
    """Rounds of sequences of about one length, at most one for each bin that is not ahead by more than that.

    `extra` (n,) float32: cost beyond what the length explains. In a round the bin with the most of it so far gets the
    least; the last rounds give the emptiest bin the longest. `lead`: tokens by which a bin counts as fuller for each
    unit of extra, less and less towards the end, so that a bin with a very long sequence is filled up with short ones.
    Holds up to num_bins * limit sequences.
    """
    bin_of = np.full(len(lengths), NOWHERE, np.int32)
    counts = np.zeros(num_bins, np.int64)
    tokens = np.zeros(num_bins, np.int64)
    extras = np.zeros(num_bins, np.float32)
    level = np.empty(num_bins)
    done = 0
    while done < len(lengths):
        lead_now = lead * (1 - done / len(lengths))
        least = np.inf
        for b in range(num_bins):
            level[b] = tokens[b] + lead_now * extras[b]
            if counts[b] < limit:
                least = min(least, level[b])
        bins = np.flatnonzero((counts < limit) & (level < least + lengths[longest_first[done]]))
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
def pack_tightly(lengths, longest_first, num_bins, budget, limit):
    """Each into the first bin with room (first-fit decreasing), found in a tree of the largest room below each node."""
    leaves = 1
    while leaves < num_bins:
        leaves *= 2
    room = np.full(2 * leaves, -1, np.int64)
    room[leaves : leaves + num_bins] = budget
    for node in range(leaves - 1, 0, -1):
        room[node] = max(room[2 * node], room[2 * node + 1])
    counts = np.zeros(num_bins, np.int64)
    bin_of = np.full(len(lengths), NOWHERE, np.int32)
    for i in longest_first:
        if room[1] < lengths[i]:
            continue
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[i] else 2 * node + 1
        b = node - leaves
        bin_of[i] = b
        counts[b] += 1
        room[node] = -1 if counts[b] == limit else room[node] - lengths[i]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bin_of
