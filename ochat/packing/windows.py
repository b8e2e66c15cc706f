"""Cut the epoch's shuffled stream into windows and pack them one after another.

    for counts, tokens, costs in pack_stream(stream, rng): ...      `stream.order` ends up in bin order

A window looks at the stream's next sequences, spreads them evenly over its bins and exchanges them between bins until
tokens fit and costs are alike. If lengths are so near the budget that this leaves room, it packs tightly instead. What
it cannot place goes back to the stream's head, in order, so a window holds a random sample of the epoch. Bins then go
to steps in rounds of about equally many sequences, so that every step is a fair sample.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ochat.packing.kernels import UNASSIGNED, assign_balanced, first_fit_decreasing, rebalance

MOSTLY_PLACED, MOST_OFFERS = 0.98, 8  # share of the offered tokens that must find a place, and offers made
GOOD_FILL = 0.999  # of what a window was meant to hold
GOOD_COST = 1.004  # of its costliest bin over the mean
POOL = 64  # sequences after a window's own that may take a place in it, to fill what is left
LEAST_SLACK, MOST_SLACK = 1e-4, 2e-3  # share of a window left free: what the epoch's steps can afford, in these bounds
SPARE_STEPS = 1.5e-3  # share of an epoch's steps that a generous window may assume on top of the fewest
COST_TOLERANCE = 3e-3  # by which a bin may cost more than the mean of its window


@dataclass(eq=False)
class Stream:
    """What is left of the epoch: `order[head:]`; before `head` are the bins' sequences.

    A bin holds `budget` tokens and `max_sequences` sequences at most.
    """

    order: NDArray
    lengths: NDArray
    costs: NDArray | None
    budget: int
    bins_per_step: int
    max_sequences: int

    def __post_init__(self) -> None:
        self.head, self.num_tokens = 0, int(self.lengths.sum(dtype=np.int64))
        self.steps_allowed = self.num_steps() + int(SPARE_STEPS * self.num_steps())

    def __len__(self) -> int:
        return len(self.order) - self.head

    def num_steps(self) -> int:
        """The fewest steps that may hold the rest."""
        bins = max(-(-self.num_tokens // self.budget), -(-len(self) // self.max_sequences))
        return -(-bins // self.bins_per_step)

    def target(self, num_steps: int, is_generous: bool) -> int:
        """Tokens that the next `num_steps` steps should hold: full but for a slack, if the steps left can afford it."""
        steps_left = max(self.num_steps(), self.steps_allowed if is_generous else 0)
        step_room = self.budget * self.bins_per_step
        free = 1 - self.num_tokens / (steps_left * step_room)
        return int(num_steps * step_room * (1 - min(max(free, LEAST_SLACK), MOST_SLACK)))

    def take_candidates(self, num_steps: int, offered: int) -> tuple[NDArray, int]:
        """The next sequences of together `offered` tokens, followed by the pool; and the number of the former."""
        most = num_steps * self.bins_per_step * self.max_sequences
        num_own, total = self._prefix(offered, most)
        seen = self.order[self.head : self.head + num_own + POOL].copy()
        if num_own < most:
            _fill_gap(seen, self.lengths[seen].astype(np.int64), num_own, offered - total)
        return seen, num_own

    def _prefix(self, target: int, most: int) -> tuple[int, int]:
        """Number and tokens of the stream's next sequences that are within `target` tokens and `most` sequences."""
        count, total, block = 0, 0, 1 << 16
        while count < min(most, len(self)):
            begin = self.head + count
            ahead = self.order[begin : begin + min(block, most - count)]
            sums = np.cumsum(self.lengths[ahead], dtype=np.int64) + total
            inside = int(np.searchsorted(sums, target, side="right"))
            count += inside
            total = int(sums[inside - 1]) if inside else total
            if inside < len(ahead):
                break
        return count, total

    def take(self, window: Window) -> NDArray:
        """Move the head past the window's members, now in bin order; the members."""
        members = window.seen[window.members]
        is_left = np.ones(len(window.seen), bool)
        is_left[window.members] = False
        self.order[self.head : self.head + len(is_left)] = np.concatenate([members, window.seen[is_left]])
        self.head += len(members)
        self.num_tokens -= window.num_tokens
        self.steps_allowed -= len(window.counts) // self.bins_per_step
        return members


@dataclass(frozen=True)
class Window:
    """Packed bins; the stream is unchanged until `Stream.take`."""

    seen: NDArray  # the sequences at the stream's head that were looked at
    members: NDArray[np.int64]  # places in `seen`, bin by bin
    counts: NDArray[np.int64]  # (bins,)
    num_tokens: int
    worst_cost: float  # largest over mean cost of its bins; 1 without costs
    fill: float = 0.0  # tokens over those that it was meant to hold; 1 if it holds all the rest

    @property
    def score(self) -> tuple[float, float]:
        """The larger, the better: fill before costs, where the fill is not good already."""
        return min(self.fill, GOOD_FILL), -max(self.worst_cost, GOOD_COST)


@dataclass(frozen=True)
class Strategy:
    """How to pack a window of `num_bins`: balanced (bins alike) or tight (each bin as full as possible)."""

    num_bins: int
    is_tight: bool = False
    is_generous: bool = False
    cost_priority: float = 0.0  # how strongly costly bins are filled up with short sequences


# a window tries them until one is good, and leaves its choice to the next
STRATEGIES = (
    Strategy(256),  # enough that every bin finds partners to exchange with
    Strategy(256, cost_priority=30.0),
    Strategy(256, is_generous=True),
    Strategy(1024, is_tight=True),
    Strategy(4096, is_tight=True),
    Strategy(16384, is_tight=True),
    Strategy(65536, is_tight=True),
)


def pack_stream(stream: Stream, rng: np.random.Generator) -> Generator[tuple[NDArray, NDArray, NDArray]]:
    """Bring the stream into bin order; yields each window's (sequences, tokens, cost) of its bins, in whole steps."""
    costs, strategy = stream.lengths if stream.costs is None else stream.costs, 0
    while len(stream):
        window, strategy = _next_window(stream, strategy)
        window = _shuffle_bins(window, stream.bins_per_step, rng)
        members = stream.take(window)
        tokens = _bin_sums(stream.lengths[members], window.counts)
        yield window.counts, tokens.astype(np.int64), _bin_sums(costs[members], window.counts)


def _bin_sums(values: NDArray, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of `values` (n,) in each bin, of `counts` values."""
    return np.bincount(np.repeat(np.arange(len(counts)), counts), values, len(counts)).astype(np.float64)


def _next_window(stream: Stream, first_strategy: int) -> tuple[Window, int]:
    """The next window, and the number of its strategy, from `first_strategy` on."""
    tried: list[tuple[Window, int]] = []
    for number, strategy in enumerate(STRATEGIES[first_strategy:], first_strategy):
        num_steps = _window_steps(stream, strategy)
        if tried and _is_pointless(stream, strategy, num_steps, max(window.fill for window, _ in tried)):
            continue
        tried.append((_pack_window(stream, num_steps, strategy), number))
        if tried[-1][0].score == (GOOD_FILL, -GOOD_COST) or (strategy.is_tight and num_steps == stream.num_steps()):
            break
    return max(tried, key=lambda entry: entry[0].score)


def _is_pointless(stream: Stream, strategy: Strategy, num_steps: int, best_fill: float) -> bool:
    """Whether this strategy cannot improve what is wrong so far, too little fill or uneven costs."""
    if strategy.is_tight:
        return best_fill >= GOOD_FILL
    if strategy.cost_priority:
        return stream.costs is None or best_fill < GOOD_FILL
    return stream.target(num_steps, True) == stream.target(num_steps, False)


def _window_steps(stream: Stream, strategy: Strategy) -> int:
    """Whole steps of a window, and those that are left after it where they are too few for another."""
    wanted, left = -(-strategy.num_bins // stream.bins_per_step), stream.num_steps()
    return left if 2 * left <= 3 * wanted else wanted


def _pack_window(stream: Stream, num_steps: int, strategy: Strategy) -> Window:
    """The stream's next sequences in `num_steps` steps.

    Tight bins take the longest: were much left over again and again, the epoch would be sorted by length. So less is
    offered until nearly all of it finds a place.
    """
    target = stream.target(num_steps, strategy.is_generous)
    offered = stream.num_tokens if num_steps >= stream.num_steps() else target
    window = _pack_tokens(stream, num_steps, strategy, offered)
    for _ in range(MOST_OFFERS if strategy.is_tight else 0):
        if window.num_tokens >= MOSTLY_PLACED * offered:
            break
        offered = window.num_tokens
        window = _pack_tokens(stream, num_steps, strategy, offered)
    if not strategy.is_tight and window.num_tokens < MOSTLY_PLACED * offered:
        return window  # no tight strategy is worse
    return replace(window, fill=_fill(stream, num_steps, target, window.num_tokens))


def _pack_tokens(stream: Stream, num_steps: int, strategy: Strategy, offered: int) -> Window:
    """The stream's next `offered` tokens in `num_steps` steps."""
    num_bins, budget, max_sequences = num_steps * stream.bins_per_step, stream.budget, stream.max_sequences
    seen, num_own = stream.take_candidates(num_steps, offered)
    lengths = stream.lengths[seen].astype(np.int32)
    own = lengths[:num_own]
    extra, slope = _extra_costs(stream, seen, lengths, num_own, num_bins)
    bin_of = np.full(len(seen), UNASSIGNED, np.int32)
    longest_first = _longest_first(own)
    if strategy.is_tight:
        bin_of[:num_own] = first_fit_decreasing(own, longest_first, num_bins, budget, max_sequences)
    else:
        cost_priority = strategy.cost_priority / slope if slope else 0.0
        bin_of[:num_own] = assign_balanced(own, extra[:num_own], longest_first, num_bins, max_sequences, cost_priority)
    slack = min(max(budget - int(own.sum(dtype=np.int64)) / num_bins, 1.0), MOST_SLACK * budget)
    members, counts = rebalance(
        lengths, extra, bin_of, num_bins, budget, max_sequences, slope, slack, strategy.is_tight
    )
    members = members.astype(np.int64)
    costs = _bin_sums(extra[members] + slope * lengths[members], counts)
    worst_cost = float(costs.max() / costs.mean()) if costs.any() else 1.0
    return Window(seen, members, counts, int(lengths[members].sum(dtype=np.int64)), worst_cost)


def _fill(stream: Stream, num_steps: int, target: int, tokens: int) -> float:
    """Share of the target; below what is good for the last window where it leaves something to a step of its own."""
    if num_steps < stream.num_steps():
        return tokens / target
    return 1.0 if tokens == stream.num_tokens else 0.99 * tokens / stream.num_tokens


def _longest_first(lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Order by falling length, equal ones in the stream's order: the same on every machine."""
    shorter_by = lengths.max(initial=0) - lengths
    if shorter_by.max(initial=0) < 1 << 16:
        shorter_by = shorter_by.astype(np.uint16)  # which NumPy sorts by radix, ten times as fast
    return np.argsort(shorter_by, kind="stable")


def _extra_costs(stream: Stream, seen: NDArray, lengths: NDArray, num_own: int, num_bins: int) -> tuple[NDArray, float]:
    """Costs beyond slope * length in units of the tolerance, and the slope, which leaves none over on average."""
    costs = np.zeros(len(seen)) if stream.costs is None else stream.costs[seen].astype(np.float64)
    total = float(np.cumsum(costs[:num_own])[-1]) if num_own else 0.0  # one after another: rounds alike everywhere
    if total <= 0:
        return np.zeros(len(seen), np.float32), 0.0
    costs *= num_bins / (total * COST_TOLERANCE)
    slope = num_bins / (COST_TOLERANCE * float(lengths[:num_own].sum(dtype=np.int64)))
    return (costs - slope * lengths).astype(np.float32), slope


def _shuffle_bins(window: Window, bins_per_step: int, rng: np.random.Generator) -> Window:
    """Bins dealt to steps in rounds of about equally many sequences, so that steps are alike; empty ones come last."""
    num_bins, num_filled = len(window.counts), int(np.count_nonzero(window.counts))
    by_count = rng.permutation(num_bins)
    by_count = by_count[np.argsort(-window.counts[by_count], kind="stable")]
    order = np.empty(num_bins, np.int64)
    places = rng.permuted(np.arange(num_bins).reshape(-1, bins_per_step).T, axis=1).ravel()  # step by round
    places = places[np.argsort(places >= num_filled, kind="stable")]
    order[places] = by_count
    starts = np.cumsum(window.counts) - window.counts
    counts = window.counts[order]
    inside = np.arange(len(window.members)) - np.repeat(np.cumsum(counts) - counts, counts)
    return replace(window, members=window.members[np.repeat(starts[order], counts) + inside], counts=counts)


def _fill_gap(seen: NDArray, lengths: NDArray[np.int64], num_own: int, gap: int) -> None:
    """Exchange in place one of the last own sequences with one of the pool, so that the gap is filled best."""
    first = max(num_own - POOL, 0)
    gain = lengths[None, num_own:] - lengths[first:num_own, None]  # (own, pool)
    if gain.size == 0:
        return
    own, pool = np.unravel_index(np.argmax(np.where(gain <= gap, gain, -1)), gain.shape)
    if 0 < gain[own, pool] <= gap:
        own, pool = first + own, num_own + pool
        seen[own], seen[pool] = seen[pool], seen[own]
