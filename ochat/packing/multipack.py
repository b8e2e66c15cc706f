"""Packing: decide which sequences share a bin and which bins share a step. A pure function of (lengths, seed, epoch).

    plan = multipack.plan(lengths, token_budget=32768, bins_per_step=8, seed=0, epoch=0)
    plan.bin(0), plan.num_steps, plan.efficiency()

The epoch is shuffled once and packed in windows of a few hundred bins or one step (windows.py). Bins are full, so steps
are few; sequences are exchanged between bins until their costs are alike (kernels.py), so the ranks of a step work
equally long; a window is a random sample and spreads its bins evenly over its steps, so every step is a fair sample.
windows.py takes the sequences of a window and chooses how tightly to pack them; kernels.py puts each into a bin
(assign_balanced, first_fit_decreasing, then rebalance).
Memory: 4 bytes a sequence in addition to the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat import background
from ochat.errors import ConfigError, DataError
from ochat.packing.windows import Stream, pack_stream

KEPT = 2  # plans in an EpochPlanCache: the current epoch's and the next one's, however many epochs there are
NO_BINS = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))  # counts, tokens, costs of an empty set


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
        """Largest over mean cost among the bins of each step but the last, (num_steps - 1,): 1 is balanced."""
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

    `costs` (S,): the work of each sequence, which is balanced over the bins of a step where the budget allows. Nothing
    is dropped: a last step may have empty bins. About 0.5 us a sequence, at most some 3 us. Raises DataError for a
    length that no bin holds, ConfigError for settings.
    """
    settings = {"token_budget": token_budget, "bins_per_step": bins_per_step, "max_sequences": max_sequences}
    for name, value in (settings | {"seed": seed, "epoch": epoch}).items():
        least = 1 if name in settings else 0
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: at least {least} is needed")
    sizes = _check_lengths(lengths, token_budget)
    work = _check_costs(costs, len(sizes))
    rng = np.random.default_rng([seed, epoch])
    order = np.arange(len(sizes), dtype=np.int32 if len(sizes) < 1 << 31 else np.int64)
    rng.shuffle(order)

    stream = Stream(order, sizes, work, token_budget, bins_per_step, max_sequences or max(len(sizes), 1))
    windows = list(pack_stream(stream, rng))
    counts, bin_tokens, bin_costs = (np.concatenate(part) for part in zip(NO_BINS, *windows, strict=True))
    indices, bin_offsets = order.astype(np.int64), np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    num_steps = len(counts) // bins_per_step
    return PackPlan(indices, bin_offsets, num_steps, token_budget, bins_per_step, bin_tokens, bin_costs)


def joined(first: PackPlan, num_steps: int, then: PackPlan) -> PackPlan:
    """The first `num_steps` steps of a plan, and then all of another one."""
    bins = num_steps * first.bins_per_step
    cut = first.bin_offsets[bins]
    return replace(
        first,
        indices=np.concatenate([first.indices[:cut], then.indices]),
        bin_offsets=np.concatenate([first.bin_offsets[:bins], cut + then.bin_offsets]),
        num_steps=num_steps + then.num_steps,
        bin_tokens=np.concatenate([first.bin_tokens[:bins], then.bin_tokens]),
        bin_costs=np.concatenate([first.bin_costs[:bins], then.bin_costs]),
    )


class EpochPlanCache:
    """`cache(epoch)` is that epoch's plan, made by `make` once while it is kept; two are kept. Thread-safe."""

    def __init__(self, make: Callable[[int], PackPlan]) -> None:
        self._lock = threading.Lock()
        self._begun = lru_cache(KEPT)(lambda epoch: background.start(lambda: make(epoch), f"plan of epoch {epoch}"))

    def __call__(self, epoch: int) -> PackPlan:
        """The plan, once it is made. Raises what making it raised."""
        return self.start(epoch).result()

    def start(self, epoch: int) -> Future[PackPlan]:
        """The plan to come, which a thread makes unless it is there or being made."""
        with self._lock:  # two threads that ask at once would start it twice
            return self._begun(epoch)


def _check_lengths(lengths: ArrayLike, budget: int) -> NDArray:
    sizes = np.asarray(lengths)
    if sizes.ndim != 1 or (len(sizes) and not np.issubdtype(sizes.dtype, np.integer)):
        raise DataError(f"lengths must be one list of whole numbers, not {sizes.dtype} of shape {sizes.shape}")
    if len(wrong := np.flatnonzero((sizes < 1) | (sizes > budget))):
        raise DataError(
            f"sequence {wrong[0]} has {sizes[wrong[0]]} tokens, outside 1 ... {budget} (token_budget); {len(wrong)} "
            "such: raise the budget, or truncate or drop the sequence"
        )
    return sizes


def _check_costs(costs: ArrayLike | None, num_sequences: int) -> NDArray | None:
    if costs is None:
        return None
    work = np.asarray(costs)
    if work.shape != (num_sequences,):
        raise DataError(f"costs have the shape {work.shape}, lengths ({num_sequences},): one per sequence is needed")
    if len(wrong := np.flatnonzero(~np.isfinite(work) | (work < 0))):
        raise DataError(f"sequence {wrong[0]} costs {work[wrong[0]]}: a finite number from 0 up is needed")
    return work
