"""The compiled loop of the packer that evens a window's bins by exchanging sequences two by two.

    members, counts = even_out(lengths, extra, bin_of, num_bins, budget, limit, slope, slack, is_strict)

Bins lie side by side as slots, each with a few empty ones: an empty slot is a sequence of no tokens and no cost, so
that to move a sequence is to exchange it too. Called from Python only, as the loops of bins.py are.
"""

from __future__ import annotations

import numpy as np
from numba import njit

EMPTY = -1
PASSES = 24
LOOSE_PASSES = 8  # the first ones, which even costs and let tokens go; the others hold both
SPARE_SLOTS = 2
MOST_TRIED = 64  # slots of a bin that one exchange looks at: 4096 pairs


@njit(cache=True)
def _lay_out(lengths, extra, bin_of, num_bins, limit):
    """Slots (tokens, extra, sequence) of the bins, then of what is in none, with room there for every sequence."""
    counts = np.zeros(num_bins + 1, np.int64)
    for b in bin_of:
        counts[b] += 1  # NOWHERE is the last
    starts = np.zeros(num_bins + 2, np.int64)
    for b in range(num_bins):
        starts[b + 1] = starts[b] + min(counts[b] + SPARE_SLOTS, limit)
    starts[num_bins + 1] = starts[num_bins] + len(lengths) + 1
    tokens = np.zeros(starts[-1], np.float32)
    extras = np.zeros(starts[-1], np.float32)
    sequence = np.full(starts[-1], EMPTY, np.int32)
    at = starts[:-1].copy()
    for i in range(len(bin_of)):
        b = bin_of[i] if bin_of[i] >= 0 else num_bins
        tokens[at[b]], extras[at[b]], sequence[at[b]] = lengths[i], extra[i], i
        at[b] += 1
    return starts, at[num_bins], tokens, extras, sequence


@njit(cache=True, fastmath={"nnan", "nsz"})  # lets the minimum be vectorised; nothing that rounds differently elsewhere
def _best_exchange(tokens, extras, from_a, to_a, from_b, to_b, want_tokens, want_extra, weight, least, most):
    """Slots (a, b) whose difference comes nearest to what is wanted, `least` to `most` tokens of it; or (-1, -1)."""
    best = want_tokens * want_tokens * weight + want_extra * want_extra
    best *= np.float32(0.98)  # by less it is not worth an exchange
    best_a, best_b = -1, -1
    for a in range(from_a, to_a):
        nearest = best
        for b in range(from_b, to_b):
            given = tokens[a] - tokens[b]
            off, off_extra = want_tokens - given, want_extra - (extras[a] - extras[b])
            score = off * off * weight + off_extra * off_extra
            nearest = min(nearest, score if (given >= least) & (given <= most) else best)
        if nearest < best:
            for b in range(from_b, to_b):
                given = tokens[a] - tokens[b]
                off, off_extra = want_tokens - given, want_extra - (extras[a] - extras[b])
                if (given >= least) & (given <= most) & (off * off * weight + off_extra * off_extra == nearest):
                    best_a, best_b = a, b
            best = nearest
    return best_a, best_b


@njit(cache=True)
def _some_slots(starts, b, turn):
    """At most MOST_TRIED slots of bin `b`, others in every turn."""
    free = starts[b + 1] - starts[b] - MOST_TRIED
    begin = starts[b] + (turn * 37 % (free + 1) if free > 0 else 0)
    return begin, min(begin + MOST_TRIED, starts[b + 1])


@njit(cache=True)
def _exchange(tokens, extras, sequence, a, b):
    tokens[a], tokens[b] = tokens[b], tokens[a]
    extras[a], extras[b] = extras[b], extras[a]
    sequence[a], sequence[b] = sequence[b], sequence[a]


@njit(cache=True)
def _put_back(starts, num_outside, tokens, extras, sequence, bin_tokens, b, budget):
    """Exchange with what is in no bin, or drop there, so that the bin keeps the most that is within its budget."""
    outside = starts[-2]
    while bin_tokens[b] > budget:
        over = bin_tokens[b] - budget
        best, best_a, best_c = np.inf, -1, -1
        for a in range(starts[b], starts[b + 1]):
            for c in range(outside, min(num_outside, outside + MOST_TRIED) + 1):
                c = c if c < outside + MOST_TRIED else num_outside
                freed = np.float64(tokens[a]) - tokens[c]
                short = freed - over if freed >= over else 2.0**40 - freed  # rather too little at a time than nothing
                if freed > 0 and short < best:
                    best, best_a, best_c = short, a, c
        bin_tokens[b] -= np.float64(tokens[best_a]) - tokens[best_c]
        num_outside += best_c == num_outside
        _exchange(tokens, extras, sequence, best_a, best_c)
    return num_outside


@njit(cache=True)
def even_out(lengths, extra, bin_of, num_bins, budget, limit, slope, slack, is_strict):
    """Exchange between bins until none is over `budget` and none costs more than the mean by more than 1.

    `extra` (n,) float32: cost beyond slope * length, in units of the difference between bins that is let pass; `slack`:
    likewise, in tokens. `is_strict`: bins are within the budget and stay so all along. Sequences of no bin
    (NOWHERE) are exchanged only to bring a bin within its budget at the end. Returns the bins' sequences side by
    side, int32, and the bins' numbers of them, int64. Work: 24 passes over the bins that are not even yet.
    """
    starts, num_outside, tokens, extras, sequence = _lay_out(lengths, extra, bin_of, num_bins, limit)
    bin_tokens = np.zeros(num_bins)
    bin_extras = np.zeros(num_bins)
    for b in range(num_bins):
        for slot in range(starts[b], starts[b + 1]):
            bin_tokens[b] += tokens[slot]
            bin_extras[b] += extras[slot]
    mean_tokens, mean_extra = 0.0, 0.0
    for b in range(num_bins):
        mean_tokens += bin_tokens[b] / num_bins
        mean_extra += bin_extras[b] / num_bins

    has_costs = False
    for value in extra:
        has_costs |= value != 0
    ahead = np.empty(num_bins)
    for turn in range(2 * PASSES):
        by_cost, is_loose = turn % 2 == 0, turn < 2 * LOOSE_PASSES
        if (is_loose and not by_cost) or (by_cost and not has_costs):
            continue
        scale = max(slack, budget / 2.0 ** (6 + turn // 2)) if is_loose and not is_strict else slack
        for b in range(num_bins):
            ahead[b] = bin_tokens[b] - budget
            if by_cost:
                ahead[b] = bin_extras[b] - mean_extra - 1
                if not is_loose:
                    ahead[b] += slope * (bin_tokens[b] - mean_tokens)
        rank = np.argsort(ahead, kind="mergesort")
        half = num_bins // 2
        for place in range(half):
            high, low = rank[num_bins - 1 - place], rank[(place + turn // 2) % half]
            if ahead[high] <= 0:
                break
            from_a, to_a = _some_slots(starts, high, turn)
            from_b, to_b = _some_slots(starts, low, turn)
            a, b = _best_exchange(
                tokens,
                extras,
                from_a,
                to_a,
                from_b,
                to_b,
                np.float32((bin_tokens[high] - bin_tokens[low]) / 2),
                np.float32((bin_extras[high] - bin_extras[low]) / 2),
                np.float32(1 / scale**2),
                np.float32(bin_tokens[high] - budget if is_strict else -1e9),
                np.float32(budget - bin_tokens[low] if is_strict else 1e9),
            )
            if a < 0:
                continue
            given, given_extra = np.float64(tokens[a]) - tokens[b], np.float64(extras[a]) - extras[b]
            bin_tokens[high] -= given
            bin_tokens[low] += given
            bin_extras[high] -= given_extra
            bin_extras[low] += given_extra
            _exchange(tokens, extras, sequence, a, b)

    for b in range(num_bins):
        num_outside = _put_back(starts, num_outside, tokens, extras, sequence, bin_tokens, b, budget)
    members = sequence[: starts[num_bins]]
    counts = np.zeros(num_bins, np.int64)
    for b in range(num_bins):
        for slot in range(starts[b], starts[b + 1]):
            counts[b] += sequence[slot] != EMPTY
    return members[members != EMPTY], counts
