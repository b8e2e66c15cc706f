"""Packing: which sequences share a bin, and which bins a step. A pure function of (lengths, seed, epoch).

    plan = multipack.plan(lengths, token_budget=32768, bins_per_step=8, seed=0, epoch=0)
    plan.bin(0), plan.num_steps, plan.efficiency()

The epoch's shuffled stream is cut into windows of a few hundred bins. A window takes as many sequences as fit:
longest first, each into the emptiest bin (LPT), which leaves bins equally full and of like composition. Where
lengths come so close to the budget that LPT wastes room, first-fit decreasing (FFD) takes over. Every window is a
random sample, so steps stay a fair sample of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.data.bins import NOWHERE, even_costs, pack_ffd, pack_lpt
from ochat.errors import ConfigError, DataError

WINDOW_BINS = (256, 2048, 16384)  # the next larger one where a window stays below GOOD_FILL
GOOD_FILL = 0.995  # FFD is tried where LPT stays below: it fills more, but gives each bin its own kind of lengths

Packer = Callable[[NDArray[np.int64], int, int, int], tuple[bool, NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """An epoch: bin b of step s holds `indices[bin_offsets[i] : bin_offsets[i + 1]]`, i = s * bins_per_step + b."""

    indices: NDArray[np.int64]  # (S,) every sequence once
    bin_offsets: NDArray[np.int64]  # (num_steps * bins_per_step + 1,)
    num_steps: int
    token_budget: int
    bins_per_step: int
    bin_tokens: NDArray[np.int64]  # (num_steps * bins_per_step,)
    bin_costs: NDArray[np.float64]  # (num_steps * bins_per_step,) sums of costs; of lengths where none were given

    def bin(self, index: int) -> NDArray[np.int64]:
        """Sequences of the epoch's bin `index`."""
        return self.indices[self.bin_offsets[index] : self.bin_offsets[index + 1]]

    def efficiency(self) -> float:
        """Tokens used over num_steps * bins_per_step * token_budget; 1 for an epoch without steps."""
        room = self.num_steps * self.bins_per_step * self.token_budget
        return float(self.bin_tokens.sum()) / room if room else 1.0

    def cost_imbalance(self) -> NDArray[np.float64]:
        """Largest over mean cost among the bins of each step but the last (num_steps - 1,): what a rank waits; >= 1."""
        costs = self.bin_costs.reshape(self.num_steps, self.bins_per_step)[:-1]
        mean = costs.mean(axis=1)
        return np.where(mean > 0, costs.max(axis=1) / np.where(mean > 0, mean, 1), 1.0)  # no work at all is even


def plan(
    lengths: ArrayLike,
    *,
    token_budget: int,
    bins_per_step: int,
    seed: int,
    epoch: int,
    costs: ArrayLike | None = None,
    max_sequences: int | None = None,
) -> PackPlan:
    """Pack `lengths` (S,) into bins of at most `token_budget` tokens and `max_sequences` documents.

    `costs` (S,): the work of each sequence; where the budget allows, the bins of a step are evened in it. Nothing
    is dropped: a last step may have empty bins. Time O(S log S) per window. Raises DataError for a length that no
    bin holds, ConfigError for settings.
    """
    _check_settings(token_budget, bins_per_step, seed, epoch, max_sequences)
    sizes = _check_lengths(lengths, token_budget)
    work = _check_costs(costs, sizes)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    limit = max_sequences or max(len(sizes), 1)

    parts: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.int64]] = []
    taken = 0
    while taken < len(order):
        bin_of, num_bins = _fill_window(sizes, order[taken:], token_budget, bins_per_step, limit)
        window = order[taken : taken + len(bin_of)]
        bin_of = _shuffle_bins(bin_of, num_bins, rng)
        if costs is not None:
            bin_of = even_costs(bin_of, sizes[window], work[window], bins_per_step, token_budget, limit)
        parts.append(window[np.argsort(bin_of, kind="stable")])
        counts.append(np.bincount(bin_of, minlength=num_bins))
        taken += len(window)

    indices = np.concatenate([np.zeros(0, np.int64), *parts])
    bin_offsets = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))]).astype(np.int64)
    return PackPlan(
        indices=indices,
        bin_offsets=bin_offsets,
        num_steps=(len(bin_offsets) - 1) // bins_per_step,
        token_budget=token_budget,
        bins_per_step=bins_per_step,
        bin_tokens=_sum_bins(sizes[indices], bin_offsets),
        bin_costs=_sum_bins(work[indices], bin_offsets),
    )


def _fill_window(
    sizes: NDArray[np.int64], stream: NDArray[np.int64], budget: int, bins_per_step: int, limit: int
) -> tuple[NDArray[np.int64], int]:
    """Bin of each sequence at the stream's head that the next window takes, and its number of bins (whole steps)."""
    bin_of, num_bins = np.zeros(0, np.int64), 0
    for window_bins in WINDOW_BINS:
        num_bins = -(-window_bins // bins_per_step) * bins_per_step
        head = sizes[stream[: _most_that_fit(sizes, stream, num_bins, budget, limit)]]
        if len(head) == len(stream):
            bin_of, num_bins = _fewest_steps(head, num_bins, budget, bins_per_step, limit)
        else:
            bin_of = _longest_prefix(head, num_bins, budget, limit)
        if len(bin_of) == len(stream) or head[: len(bin_of)].sum() >= GOOD_FILL * num_bins * budget:
            break
    return bin_of, num_bins


def _fewest_steps(
    head: NDArray[np.int64], most_bins: int, budget: int, bins_per_step: int, limit: int
) -> tuple[NDArray[np.int64], int]:
    """All that is left in as few whole steps as hold it; a prefix of it in `most_bins` where they do not."""
    bins_needed = max(-(-int(head.sum()) // budget), -(-len(head) // limit))
    for num_bins in range(-(-bins_needed // bins_per_step) * bins_per_step, most_bins + 1, bins_per_step):
        for pack in (pack_lpt, pack_ffd):
            fits, bin_of = pack(head, num_bins, budget, limit)
            if fits:
                return bin_of, num_bins
    return _longest_prefix(head, most_bins, budget, limit), most_bins


def _most_that_fit(sizes: NDArray[np.int64], stream: NDArray[np.int64], num_bins: int, budget: int, limit: int) -> int:
    """Number of sequences at the stream's head whose tokens do not exceed the bins' room together."""
    at_most = min(len(stream), num_bins * limit)
    room, count, total = num_bins * budget, 0, 0
    while count < at_most:  # in blocks, because the stream may be far longer than a window
        block = np.cumsum(sizes[stream[count : min(count + 65536, at_most)]]) + total
        inside = int(np.searchsorted(block, room, side="right"))
        count += inside
        if inside < len(block):
            break
        total = int(block[-1])
    return count


def _longest_prefix(head: NDArray[np.int64], num_bins: int, budget: int, limit: int) -> NDArray[np.int64]:
    """Bins of the longest prefix of `head` that LPT packs; of FFD's where LPT leaves too much room."""
    best = _search_prefix(pack_lpt, head, num_bins, budget, limit)
    if head[: len(best)].sum() < GOOD_FILL * num_bins * budget:
        other = _search_prefix(pack_ffd, head, num_bins, budget, limit)
        best = other if len(other) > len(best) else best
    return best


def _search_prefix(pack: Packer, head: NDArray[np.int64], num_bins: int, budget: int, limit: int) -> NDArray[np.int64]:
    """Gallop down from the whole of `head` to a prefix that fits, then bisect. One sequence always fits."""
    failed, step = len(head) + 1, 1
    fitting, best = 0, np.zeros(0, np.int64)
    while fitting + 1 < failed:
        tried = max(failed - step, fitting + 1) if fitting == 0 else (fitting + failed) // 2
        fits, bin_of = pack(head[:tried], num_bins, budget, limit)
        if fits:
            fitting, best = tried, bin_of
        else:
            failed, step = tried, step * 4
    return best


def _shuffle_bins(bin_of: NDArray[np.int64], num_bins: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Bins in random order, so that no step gets the longest sequences; empty ones stay at the end."""
    filled = np.unique(bin_of)
    new_place = np.full(num_bins, NOWHERE, np.int64)
    new_place[filled] = rng.permutation(len(filled))
    return new_place[bin_of]


def _sum_bins(values: NDArray, bin_offsets: NDArray[np.int64]) -> NDArray:
    """Sums of `values` (S,) over bins; exact for integers."""
    totals = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return totals[bin_offsets[1:]] - totals[bin_offsets[:-1]]


def _check_settings(budget: int, bins_per_step: int, seed: int, epoch: int, max_sequences: int | None) -> None:
    for name, value, least in (
        ("token_budget", budget, 1),
        ("bins_per_step", bins_per_step, 1),
        ("seed", seed, 0),
        ("epoch", epoch, 0),
        ("max_sequences", 1 if max_sequences is None else max_sequences, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}: at least {least} is needed")


def _check_lengths(lengths: ArrayLike, budget: int) -> NDArray[np.int64]:
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or (len(sizes) and not np.issubdtype(sizes.dtype, np.integer)):
        raise DataError(f"lengths must be one list of whole numbers, not {sizes.dtype} of shape {sizes.shape}")
    sizes = sizes.astype(np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > budget))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"sequence {first} has {sizes[first]} tokens, outside 1 ... {budget} (token_budget); {len(wrong)} such: "
            "raise the budget, or truncate or drop the sequence"
        )
    return sizes


def _check_costs(costs: ArrayLike | None, sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    work = sizes.astype(np.float64) if costs is None else np.asarray(costs, np.float64)
    if work.shape != sizes.shape:
        raise DataError(f"costs have the shape {work.shape}, lengths {sizes.shape}: one cost per sequence is needed")
    wrong = np.flatnonzero(~np.isfinite(work) | (work < 0))
    if len(wrong):
        raise DataError(f"sequence {wrong[0]} costs {work[wrong[0]]}: a finite number from 0 up is needed")
    return work
