"""What is left of an epoch's shuffled order, and the candidates for the next window.

A window looks at the next sequences; those that it cannot place go back to the head, in the stream's order. So a window
holds a random sample of the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GOOD_FILL = 0.999  # of what a window was meant to hold
GOOD_COST = 1.004  # of its costliest bin over the mean
POOL = 64  # sequences after a window's own that may take a place in it, to fill what is left
LEAST_SLACK, MOST_SLACK = 1e-4, 2e-3  # share of a window left free: what the epoch's steps can afford, in these bounds
SPARE_STEPS = 1.5e-3  # share of an epoch's steps that a generous window may assume on top of the fewest


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


class Stream:
    """What is left of the epoch: `order[head:]`; before `head` are the bins' sequences.

    A bin holds `budget` tokens and `max_sequences` sequences at most.
    """

    def __init__(
        self,
        order: NDArray,
        lengths: NDArray,
        costs: NDArray | None,
        budget: int,
        bins_per_step: int,
        max_sequences: int,
    ) -> None:
        self.order, self.lengths, self.costs = order, lengths, costs
        self.budget, self.bins_per_step, self.max_sequences = budget, bins_per_step, max_sequences
        self.head, self.num_tokens = 0, int(lengths.sum(dtype=np.int64))
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
