"""The epoch's shuffled stream, cut into windows that are packed one after another.

    for counts, tokens, costs in pack_stream(order, lengths, costs, rules, rng): ...      `order` ends up in bin order

A window takes the next sequences of the stream until its steps are full; what a window could not place goes back to
the head of the stream, in the stream's order. So a window is a random sample, and so is each step of it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ochat.data.bins import NOWHERE, deal_evenly, pack_tightly
from ochat.data.swaps import even_out

WINDOW_BINS = 256  # enough that every bin finds partners to exchange with
TIGHT_WINDOW_BINS = (1024, 4096, 16384)  # the next larger one where a window stays below GOOD_FILL
GOOD_FILL = 0.999  # of what was meant to be filled
POOL = 64  # sequences after a window's own that may take a place in it, to fill what is left
LEAST_SLACK, MOST_SLACK = 1e-4, 2e-3  # share of a window that is left free where the epoch's steps have the room
COST_TOLERANCE = 2e-3  # by which a bin may cost more than the mean of its window


@dataclass(frozen=True)
class Rules:
    """What a bin and a step may hold; `limit` is the most sequences in a bin."""

    budget: int
    bins_per_step: int
    limit: int

    @property
    def step_room(self) -> int:
        return self.budget * self.bins_per_step


@dataclass(frozen=True)
class Window:
    """Bins side by side: sequences (stream positions) of each, and what is left of the stream's head."""

    members: NDArray[np.int64]  # positions from the stream's head, bin by bin
    counts: NDArray[np.int64]  # (bins,)
    num_seen: int  # positions of the head that were looked at

    @property
    def rest(self) -> NDArray[np.int64]:
        """Positions that found no place, in the stream's order."""
        is_free = np.ones(self.num_seen, bool)
        is_free[self.members] = False
        return np.flatnonzero(is_free)


class Stream:
    """What is left of the epoch: `order[head:]`; before `head` are the bins' sequences."""

    def __init__(self, order: NDArray, lengths: NDArray, costs: NDArray | None, rules: Rules) -> None:
        self.order, self.lengths, self.costs, self.rules = order, lengths, costs, rules
        self.head = 0
        self.num_tokens = int(lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self.order) - self.head

    def next(self, count: int) -> NDArray:
        """The next `count` sequences, or as many as there are."""
        return self.order[self.head : self.head + count]

    def num_steps(self) -> int:
        """The fewest steps that may hold the rest."""
        rules = self.rules
        return max(-(-self.num_tokens // rules.step_room), -(-len(self) // (rules.bins_per_step * rules.limit)))

    def target(self, num_steps: int) -> int:
        """Tokens that the next `num_steps` steps should hold: full but for a slack, if the steps left can afford it."""
        free = 1 - self.num_tokens / (self.num_steps() * self.rules.step_room)
        return int(num_steps * self.rules.step_room * (1 - min(max(free, LEAST_SLACK), MOST_SLACK)))

    def take(self, window: Window) -> NDArray:
        """Move the head past the window's members, now in bin order; the members."""
        seen = self.next(window.num_seen)
        members = seen[window.members]
        seen[:] = np.concatenate([members, seen[window.rest]])
        self.head += len(members)
        self.num_tokens -= int(self.lengths[members].sum(dtype=np.int64))
        return members


def pack_stream(
    order: NDArray, lengths: NDArray, costs: NDArray | None, rules: Rules, rng: np.random.Generator
) -> Generator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Bring `order` (S,) into bin order; yields each window's (sequences, tokens, cost) of its bins, in whole steps."""
    stream, level = Stream(order, lengths, costs, rules), 0
    while len(stream):
        window, level = _next_window(stream, level)
        window = _shuffle_bins(window, rng)
        members = stream.take(window)
        bin_of = np.repeat(np.arange(len(window.counts)), window.counts)
        tokens = np.bincount(bin_of, lengths[members], len(window.counts))
        work = tokens if costs is None else np.bincount(bin_of, costs[members], len(window.counts))
        yield window.counts, tokens.astype(np.int64), work


def _next_window(stream: Stream, level: int) -> tuple[Window, int]:
    """The next window and the level it needed: 0 deals evenly, those above pack tightly, in larger windows each."""
    best, best_fill = None, -1.0
    for tried in range(level, 1 + len(TIGHT_WINDOW_BINS)):
        num_bins = WINDOW_BINS if tried == 0 else TIGHT_WINDOW_BINS[tried - 1]
        num_steps = min(-(-num_bins // stream.rules.bins_per_step), stream.num_steps())
        window = _pack_window(stream, num_steps, is_tight=tried > 0)
        tokens = stream.lengths[stream.next(window.num_seen)[window.members]].sum(dtype=np.int64)
        fill = 1.0 if len(window.members) == len(stream) else tokens / stream.target(num_steps)
        if fill > best_fill:
            best, best_fill, level = window, fill, tried
        if fill >= GOOD_FILL or num_steps == stream.num_steps() and tried > 0:
            break
    assert best is not None and len(best.members), "a window without sequences would never end"
    return best, level


def _pack_window(stream: Stream, num_steps: int, is_tight: bool) -> Window:
    rules, num_bins = stream.rules, num_steps * stream.rules.bins_per_step
    seen, num_own = _own_and_pool(stream, num_steps)
    lengths = stream.lengths[seen].astype(np.int32)
    extra, slope = _extra_costs(stream, seen, lengths, num_own, num_bins)
    bin_of = np.full(len(seen), NOWHERE, np.int32)
    longest_first = _longest_first(lengths[:num_own])
    if is_tight:
        bin_of[:num_own] = pack_tightly(lengths[:num_own], longest_first, num_bins, rules.budget, rules.limit)
    else:
        bin_of[:num_own] = deal_evenly(lengths[:num_own], extra[:num_own], longest_first, num_bins, rules.limit)
    slack = max(rules.budget - lengths[:num_own].sum(dtype=np.int64) / num_bins, 1.0)
    members, counts = even_out(
        lengths, extra, bin_of, num_bins, rules.budget, rules.limit, slope, slack, is_tight
    )
    return Window(members.astype(np.int64), counts, len(seen))


def _own_and_pool(stream: Stream, num_steps: int) -> tuple[NDArray, int]:
    """The sequences that a window of so many steps takes, then the pool behind them; and the number of the former."""
    rules, room, steps_left = stream.rules, num_steps * stream.rules.step_room, stream.num_steps()
    most = num_steps * rules.bins_per_step * rules.limit
    if num_steps == steps_left and stream.num_tokens <= room:
        return stream.next(len(stream)), len(stream)
    target = stream.target(num_steps)
    num_own, total = _prefix(stream, target, most)
    seen = stream.next(num_own + POOL)
    if num_own < most:
        _fill_gap(seen, stream.lengths[seen].astype(np.int64), num_own, target - total)
    return seen, num_own


def _prefix(stream: Stream, target: int, most: int) -> tuple[int, int]:
    """Number and tokens of the stream's next sequences that are within `target` tokens and `most` sequences."""
    count, total, block = 0, 0, 1 << 16
    while count < min(most, len(stream)):
        begin = stream.head + count
        ahead = stream.order[begin : begin + min(block, most - count)]
        sums = np.cumsum(stream.lengths[ahead], dtype=np.int64) + total
        inside = int(np.searchsorted(sums, target, side="right"))
        count += inside
        total = int(sums[inside - 1]) if inside else total
        if inside < len(ahead):
            break
    return count, total


def _fill_gap(seen: NDArray, lengths: NDArray[np.int64], num_own: int, gap: int) -> None:
    """Exchange in the stream one of the last own sequences with one of the pool, so that the gap is filled best."""
    first = max(num_own - POOL, 0)
    gain = lengths[None, num_own:] - lengths[first:num_own, None]  # (own, pool)
    if gain.size == 0:
        return
    own, pool = np.unravel_index(np.argmax(np.where(gain <= gap, gain, -1)), gain.shape)
    if 0 < gain[own, pool] <= gap:
        own, pool = first + own, num_own + pool
        seen[own], seen[pool] = seen[pool], seen[own]


def _longest_first(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Order by falling length, equal ones in the stream's order: the same on every machine."""
    shorter_by = lengths.max(initial=0) - lengths
    if shorter_by.max(initial=0) < 1 << 16:
        shorter_by = shorter_by.astype(np.uint16)  # which NumPy sorts by radix, ten times as fast
    return np.argsort(shorter_by, kind="stable")


def _extra_costs(
    stream: Stream, seen: NDArray, lengths: NDArray, num_own: int, num_bins: int
) -> tuple[NDArray[np.float32], float]:
    """Costs beyond slope * length in units of the tolerance, and the slope, which leaves none over on average."""
    if stream.costs is None:
        return np.zeros(len(seen), np.float32), 0.0
    costs = stream.costs[seen].astype(np.float64)
    total = float(np.cumsum(costs[:num_own])[-1]) if num_own else 0.0  # one after another: rounds alike everywhere
    if total <= 0:
        return np.zeros(len(seen), np.float32), 0.0
    costs *= num_bins / (total * COST_TOLERANCE)
    slope = num_bins / (COST_TOLERANCE * float(lengths[:num_own].sum(dtype=np.int64)))
    return (costs - slope * lengths).astype(np.float32), slope


def _shuffle_bins(window: Window, rng: np.random.Generator) -> Window:
    """Bins in random order, so that no step gets the longest sequences; empty ones come last."""
    order = rng.permutation(len(window.counts))
    order = order[np.argsort(window.counts[order] == 0, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(window.counts)])[:-1]
    counts = window.counts[order]
    inside = np.arange(len(window.members)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Window(window.members[np.repeat(starts[order], counts) + inside], counts, window.num_seen)
