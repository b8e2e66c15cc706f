"""The epoch's shuffled stream, cut into windows that are packed one after another.

    for counts, tokens, costs in pack_stream(order, lengths, costs, rules, rng): ...      `order` ends up in bin order

A window deals its sequences evenly to its bins and exchanges them between bins until tokens fit and costs are alike.
Where lengths are so near to the budget that this leaves room, it packs tightly instead. Bins then go to steps in rounds
of about equally many sequences, so that every step is a fair sample.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ochat.packing.bins import NOWHERE, deal_evenly, pack_tightly
from ochat.packing.stream import (
    GOOD_COST,
    GOOD_FILL,
    MOST_SLACK,
    Rules,
    Stream,
    Window,
)
from ochat.packing.swaps import even_out

MOSTLY_PLACED, MOST_OFFERS = 0.98, 8  # share of the offered tokens that must find a place, and offers made
COST_TOLERANCE = 3e-3  # by which a bin may cost more than the mean of its window


@dataclass(frozen=True)
class Way:
    """How to pack a window of `num_bins`: even (each bin alike) or tight (each as full as it gets)."""

    num_bins: int
    is_tight: bool = False
    is_generous: bool = False
    lead: float = 0.0  # how strongly costly bins are filled up with short sequences


# a window tries them until one is good, and leaves its choice to the next
WAYS = (
    Way(256),  # enough that every bin finds partners to exchange with
    Way(256, lead=30.0),
    Way(256, is_generous=True),
    Way(1024, is_tight=True),
    Way(4096, is_tight=True),
    Way(16384, is_tight=True),
    Way(65536, is_tight=True),
)


def pack_stream(
    order: NDArray, lengths: NDArray, costs: NDArray | None, rules: Rules, rng: np.random.Generator
) -> Generator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
    """Bring `order` (S,) into bin order; yields each window's (sequences, tokens, cost) of its bins, in whole steps."""
    stream, way = Stream(order, lengths, costs, rules), 0
    while len(stream):
        window, way = _next_window(stream, way)
        window = _shuffle_bins(window, rules.bins_per_step, rng)
        members = stream.take(window)
        bin_of = np.repeat(np.arange(len(window.counts)), window.counts)
        tokens = np.bincount(bin_of, lengths[members], len(window.counts))
        work = np.bincount(bin_of, (lengths if costs is None else costs)[members], len(window.counts))
        yield window.counts, tokens.astype(np.int64), work.astype(np.float64)


def _next_window(stream: Stream, first_way: int) -> tuple[Window, int]:
    """The next window and the way that it was packed, from `first_way` on."""
    tried: list[tuple[Window, int]] = []
    for number, way in enumerate(WAYS[first_way:], first_way):
        num_steps = _window_steps(stream, way)
        if tried and _is_pointless(stream, way, num_steps, max(window.fill for window, _ in tried)):
            continue
        tried.append((_pack_window(stream, num_steps, way), number))
        if tried[-1][0].merit == (GOOD_FILL, -GOOD_COST) or (way.is_tight and num_steps == stream.num_steps()):
            break
    return max(tried, key=lambda entry: entry[0].merit)


def _is_pointless(stream: Stream, way: Way, num_steps: int, best_fill: float) -> bool:
    """Whether what is wrong so far, too little fill or uneven costs, cannot get better in this way."""
    if way.is_tight:
        return best_fill >= GOOD_FILL
    if way.lead:
        return stream.costs is None or best_fill < GOOD_FILL
    return stream.target(num_steps, True) == stream.target(num_steps, False)


def _window_steps(stream: Stream, way: Way) -> int:
    """Whole steps of a window, and those that are left after it where they are too few for another."""
    wanted, left = -(-way.num_bins // stream.rules.bins_per_step), stream.num_steps()
    return left if 2 * left <= 3 * wanted else wanted


def _pack_window(stream: Stream, num_steps: int, way: Way) -> Window:
    """The stream's next sequences in `num_steps` steps.

    Tight bins take the longest: were much left over again and again, the epoch would be sorted by length. So less is
    offered until nearly all of it finds a place.
    """
    target = stream.target(num_steps, way.is_generous)
    offered = stream.num_tokens if num_steps >= stream.num_steps() else target
    window = _pack_tokens(stream, num_steps, way, offered)
    for _ in range(MOST_OFFERS if way.is_tight else 0):
        if window.num_tokens >= MOSTLY_PLACED * offered:
            break
        offered = window.num_tokens
        window = _pack_tokens(stream, num_steps, way, offered)
    if not way.is_tight and window.num_tokens < MOSTLY_PLACED * offered:
        return window  # no tight way is worse
    return replace(window, fill=_fill(stream, num_steps, target, window.num_tokens))


def _pack_tokens(stream: Stream, num_steps: int, way: Way, offered: int) -> Window:
    """The stream's next `offered` tokens in `num_steps` steps."""
    rules, num_bins = stream.rules, num_steps * stream.rules.bins_per_step
    seen, num_own = stream.own_and_pool(num_steps, offered)
    lengths = stream.lengths[seen].astype(np.int32)
    own = lengths[:num_own]
    extra, slope = _extra_costs(stream, seen, lengths, num_own, num_bins)
    bin_of = np.full(len(seen), NOWHERE, np.int32)
    longest_first = _longest_first(own)
    if way.is_tight:
        bin_of[:num_own] = pack_tightly(own, longest_first, num_bins, rules.budget, rules.limit)
    else:
        lead = way.lead / slope if slope else 0.0
        bin_of[:num_own] = deal_evenly(own, extra[:num_own], longest_first, num_bins, rules.limit, lead)
    slack = min(max(rules.budget - int(own.sum(dtype=np.int64)) / num_bins, 1.0), MOST_SLACK * rules.budget)
    members, counts = even_out(lengths, extra, bin_of, num_bins, rules.budget, rules.limit, slope, slack, way.is_tight)
    members = members.astype(np.int64)
    worst_cost = _worst_cost(extra[members] + slope * lengths[members], counts)
    return Window(seen, members, counts, int(lengths[members].sum(dtype=np.int64)), worst_cost)


def _fill(stream: Stream, num_steps: int, target: int, tokens: int) -> float:
    """Share of the target; below what is good for the last window where it leaves something to a step of its own."""
    if num_steps < stream.num_steps():
        return tokens / target
    return 1.0 if tokens == stream.num_tokens else 0.99 * tokens / stream.num_tokens


def _worst_cost(costs: NDArray, counts: NDArray[np.int64]) -> float:
    sums = np.bincount(np.repeat(np.arange(len(counts)), counts), costs, len(counts))
    return float(sums.max() / sums.mean()) if sums.any() else 1.0


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


def _shuffle_bins(window: Window, bins_per_step: int, rng: np.random.Generator) -> Window:
    """Bins dealt to steps in rounds of about equally many sequences, so that steps are alike; empty ones come last."""
    num_bins, num_filled = len(window.counts), int(np.count_nonzero(window.counts))
    by_count = rng.permutation(num_bins)
    by_count = by_count[np.argsort(-window.counts[by_count], kind="stable")]
    order = np.empty(num_bins, np.int64)
    num_steps = num_bins // bins_per_step
    places = rng.permuted(np.arange(num_bins).reshape(num_steps, bins_per_step).T, axis=1).ravel()  # step by round
    places = places[np.argsort(places >= num_filled, kind="stable")]
    order[places] = by_count
    starts = np.cumsum(window.counts) - window.counts
    counts = window.counts[order]
    inside = np.arange(len(window.members)) - np.repeat(np.cumsum(counts) - counts, counts)
    return replace(window, members=window.members[np.repeat(starts[order], counts) + inside], counts=counts)
