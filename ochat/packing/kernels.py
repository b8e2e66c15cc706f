"""The packer's Numba kernels: assign a window's sequences to bins, and balance bins by exchanging pairs of sequences.

    # as even as possible, over the budget if need be
    bin_of = assign_balanced(lengths, extra, longest_first, num_bins, max_sequences, cost_priority)
    # as full as possible
    bin_of = first_fit_decreasing(lengths, longest_first, num_bins, budget, max_sequences)
    members, counts = rebalance(lengths, extra, bin_of, num_bins, budget, max_sequences, slope, slack, is_strict)

lengths (n,) int32 tokens; longest_first (n,) the sequences in that order; max_sequences of a bin; bin_of (n,) int32,
UNASSIGNED for a sequence without room. For rebalance, bins are slots in one array, each with a few empty ones: an empty
slot is a sequence of no tokens and no cost, so moving a sequence is an exchange too. All kernels are in this file,
because Numba's cache of a caller does not notice a change of a kernel in another one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

UNASSIGNED = -1
LAST_ROUNDS = 2  # in which sequences, short by then, make tokens even
EMPTY = -1
EFFORT = 600  # pairs of slots tried at most for each sequence of the window; most windows need a tenth
LOOSE_PASSES = 4  # the first, which even costs and let tokens go, from an eighth of the budget on; the others hold both
SPARE_SLOTS = 8
PAIR_COST = 16  # fixed cost of trying two bins, in pairs of slots
MOST_TRIED = 64  # slots of a bin that one exchange looks at
OVER_WEIGHT = 4  # how much more a token counts in a bin that is over the budget


@njit(cache=True, nogil=True)
def assign_balanced(lengths, extra, longest_first, num_bins, max_sequences, cost_priority):
    """Rounds of sequences of about one length, at most one for each bin that is not ahead by more than that.

    `extra` (n,) float32: cost beyond what the length explains. In a round the bin with the most of it so far gets the
    least; the last rounds give the emptiest bin the longest. `cost_priority`: tokens by which a bin counts as fuller
    for each unit of extra, less and less towards the end, so that short sequences fill a bin with a very long one.
    Holds up to num_bins * max_sequences sequences.
    """
    bin_of = np.full(len(lengths), UNASSIGNED, np.int32)
    counts, tokens = np.zeros(num_bins, np.int64), np.zeros(num_bins, np.int64)
    extras = np.zeros(num_bins, np.float32)
    done = 0
    while done < len(lengths):
        priority = cost_priority * (1 - done / len(lengths))
        level, has_room = tokens + priority * extras, counts < max_sequences
        bins = np.flatnonzero(has_room & (level < level[has_room].min() + lengths[longest_first[done]]))
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


@njit(cache=True, nogil=True)
def _lay_out(lengths, extra, bin_of, num_bins, max_sequences):
    """Slots (tokens, extra, sequence) of the bins, then of what is in none, with room there for every sequence."""
    counts = np.zeros(num_bins + 1, np.int64)
    for b in bin_of:
        counts[b] += 1  # UNASSIGNED is the last
    starts = np.zeros(num_bins + 2, np.int64)
    starts[1:-1] = np.cumsum(np.minimum(counts[:-1] + SPARE_SLOTS, max_sequences))
    starts[num_bins + 1] = starts[num_bins] + len(lengths) + 1
    tokens = np.zeros(starts[-1], np.float32)
    extras = np.zeros(starts[-1], np.float32)
    sequence = np.full(starts[-1], EMPTY, np.int32)
    at = starts[:-1].copy()
    for i in range(len(bin_of)):
        b = bin_of[i] if bin_of[i] >= 0 else num_bins
        tokens[at[b]], extras[at[b]], sequence[at[b]] = lengths[i], extra[i], i
        at[b] += 1
    return starts, counts, tokens, extras, sequence


# this fastmath lets the minimum be vectorised, and rounds nothing differently
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _best_exchange(tokens, extras, from_a, to_a, from_b, to_b, want_tokens, want_extra, weight, slope, least, most):
    """Slots (a, b) whose difference comes nearest to what is wanted, `least` to `most` tokens of it; or (-1, -1)."""
    best = want_tokens * want_tokens * weight + want_extra * want_extra
    best *= np.float32(0.98)  # by less it is not worth an exchange
    best_a, best_b = -1, -1
    for a in range(from_a, to_a):
        nearest = best
        for b in range(from_b, to_b):
            given = tokens[a] - tokens[b]
            off, off_extra = want_tokens - given, want_extra - (extras[a] - extras[b] + slope * given)
            score = off * off * weight + off_extra * off_extra
            nearest = min(nearest, score if (given >= least) & (given <= most) else best)
        if nearest < best:
            for b in range(from_b, to_b):
                given = tokens[a] - tokens[b]
                off, off_extra = want_tokens - given, want_extra - (extras[a] - extras[b] + slope * given)
                if (given >= least) & (given <= most) & (off * off * weight + off_extra * off_extra == nearest):
                    best_a, best_b = a, b
            best = nearest
    return best_a, best_b


@njit(cache=True, nogil=True)
def _some_slots(starts, counts, b, turn):
    """At most MOST_TRIED slots of bin `b`, others in every turn; of its empty ones, the first."""
    end = min(starts[b] + counts[b] + 1, starts[b + 1])
    free = end - starts[b] - MOST_TRIED
    begin = starts[b] + (turn * 37 % (free + 1) if free > 0 else 0)
    return begin, min(begin + MOST_TRIED, end)


@njit(cache=True, nogil=True)
def _swap_slots(tokens, extras, sequence, a, b):
    tokens[a], tokens[b] = tokens[b], tokens[a]
    extras[a], extras[b] = extras[b], extras[a]
    sequence[a], sequence[b] = sequence[b], sequence[a]


@njit(cache=True, nogil=True)
def _exchange(starts, counts, tokens, extras, sequence, bin_a, a, bin_b, b):
    """Swap slot `a` of one bin with `b` of another; a bin's empty slots stay after its sequences."""
    if sequence[a] == EMPTY:
        bin_a, a, bin_b, b = bin_b, b, bin_a, a
    _swap_slots(tokens, extras, sequence, a, b)
    if sequence[a] == EMPTY:  # moved, not exchanged
        counts[bin_a] -= 1
        counts[bin_b] += 1
        _swap_slots(tokens, extras, sequence, a, starts[bin_a] + counts[bin_a])


@njit(cache=True, nogil=True)
def _enforce_budget(starts, counts, tokens, extras, sequence, bin_tokens, b, budget):
    """Exchange with what is in no bin, or drop there, so that the bin, over its budget, keeps the most within it."""
    outside = len(counts) - 1
    longest = tokens[starts[b] : starts[b] + counts[b]].max()
    while bin_tokens[b] > budget:
        over = bin_tokens[b] - budget
        end = starts[outside] + counts[outside]
        best, best_a, best_c = np.inf, starts[b], end
        if over <= longest:  # far over, any will do
            for a in range(starts[b], starts[b] + counts[b]):
                for place in range(starts[outside], min(end, starts[outside] + MOST_TRIED) + 1):
                    c = place if place < starts[outside] + MOST_TRIED else end
                    freed = np.float64(tokens[a]) - tokens[c]
                    short = freed - over if freed >= over else 2.0**40 - freed  # rather too little than nothing
                    if freed > 0 and short < best:
                        best, best_a, best_c = short, a, c
        bin_tokens[b] -= np.float64(tokens[best_a]) - tokens[best_c]
        _exchange(starts, counts, tokens, extras, sequence, b, best_a, outside, best_c)


@njit(cache=True, nogil=True)
def rebalance(lengths, extra, bin_of, num_bins, budget, max_sequences, slope, slack, is_strict):
    """Exchange between bins until none is over `budget` and none costs more than the mean by more than 1.

    `extra` (n,) float32: cost beyond slope * length, in units of the difference between bins that is let pass; `slack`:
    likewise, in tokens. `is_strict`: bins are within the budget already, so tokens are not let go at first. Sequences
    of no bin (UNASSIGNED) are exchanged only to bring a bin within its budget at the end. Returns the sequences bin by
    bin, int32, and their number in each bin, int64. Work: at most EFFORT pairs of slots for each sequence.
    """
    starts, counts, tokens, extras, sequence = _lay_out(lengths, extra, bin_of, num_bins, max_sequences)
    bin_tokens, bin_extras = np.zeros(num_bins), np.zeros(num_bins)
    for b in range(num_bins):
        for slot in range(starts[b], starts[b + 1]):
            bin_tokens[b] += tokens[slot]
            bin_extras[b] += extras[slot]
    mean_tokens, mean_extra = (bin_tokens / num_bins).sum(), (bin_extras / num_bins).sum()

    tried, passes, stride = 0, 0, 1
    while tried < EFFORT * len(lengths) and num_bins > 1:
        is_loose = not is_strict and passes < LOOSE_PASSES
        cost_of_token, scale = (0.0, max(slack, budget / 2.0 ** (3 + passes))) if is_loose else (slope, slack)
        stride = stride * 16807 % 2147483647  # a fixed sequence of numbers: each pass finds other partners
        num_bad = 0
        for high in range(num_bins):
            ahead = bin_extras[high] - mean_extra + cost_of_token * (bin_tokens[high] - mean_tokens)
            is_over = bin_tokens[high] > budget and not is_loose
            if ahead <= 1 and not is_over:
                continue
            num_bad += 1
            low = (high + 1 + stride % (num_bins - 1)) % num_bins
            from_a, to_a = _some_slots(starts, counts, high, passes)
            from_b, to_b = _some_slots(starts, counts, low, passes)
            tried += PAIR_COST + (to_a - from_a) * (to_b - from_b)
            unit = scale / OVER_WEIGHT if is_over else scale
            more = bin_tokens[high] - bin_tokens[low]
            more_extra = bin_extras[high] - bin_extras[low] + cost_of_token * more
            least = np.float32(-1e9 if is_loose else min(bin_tokens[high] - budget, 0.0))
            most = np.float32(1e9 if is_loose else budget - bin_tokens[low])
            want, want_extra = np.float32(more / 2), np.float32(more_extra / 2)
            weight, price = np.float32(1 / unit**2), np.float32(cost_of_token)
            a, b = _best_exchange(
                tokens, extras, from_a, to_a, from_b, to_b, want, want_extra, weight, price, least, most
            )
            if a >= 0:
                for sums, values in ((bin_tokens, tokens), (bin_extras, extras)):
                    given = np.float64(values[a]) - values[b]
                    sums[high] -= given
                    sums[low] += given
                _exchange(starts, counts, tokens, extras, sequence, high, a, low, b)
        passes += 1
        if num_bad == 0 and not is_loose:
            break

    for b in np.flatnonzero(bin_tokens > budget):
        _enforce_budget(starts, counts, tokens, extras, sequence, bin_tokens, b, budget)
    members = sequence[: starts[num_bins]]
    return members[members != EMPTY], counts[:num_bins]
