"""Choose the micro-batches that a rank computes in a step: a pure function of (data, seed, epoch, step).

    loader = Loader(dataset, token_budget=8192, bins_per_step=8, seed=0, epochs=3)
    for step, batches in loader.iterate(start_step=120): ...

Rank r of R takes the bins r, r + R, ... of every step; the steps are the same on any number of ranks.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ochat.data.batch import PackedBatch, most_documents
from ochat.data.dataset import TokenDataset
from ochat.data.epoch.conditions import ConditionDraws
from ochat.data.epoch.mixture import Mixture
from ochat.errors import ConfigError, DataError
from ochat.packing import multipack
from ochat.packing.multipack import EpochPlanCache, PackPlan
from ochat.text.prefixes import NONE


@dataclass(frozen=True)
class LoaderStats:
    """Counts of the data and of the packing; imbalance is the largest over the mean cost among the bins of a step."""

    num_sequences: int  # in the first epoch
    num_tokens: int  # in the first epoch
    num_supervised: int  # labels of non-zero weight in the first epoch
    num_steps: int  # of the whole run
    steps_per_epoch: tuple[int, ...]
    fill: float  # tokens used over token budget, first epoch
    imbalance_mean: float  # of the first epoch's steps, the last one left out; 1 if there is no other
    imbalance_worst: float

    @classmethod
    def of(cls, plan: PackPlan, num_supervised: int, steps_per_epoch: tuple[int, ...], max_steps: int) -> LoaderStats:
        """Counts of a run whose first epoch is packed so. `max_steps`: of the run; 0: all."""
        imbalance, steps = plan.cost_imbalance(), sum(steps_per_epoch)
        return cls(
            num_sequences=len(plan.indices),
            num_tokens=int(plan.bin_tokens.sum()),
            num_supervised=num_supervised,
            num_steps=min(steps, max_steps or steps),
            steps_per_epoch=steps_per_epoch,
            fill=plan.efficiency(),
            imbalance_mean=float(imbalance.mean()) if len(imbalance) else 1.0,
            imbalance_worst=float(imbalance.max()) if len(imbalance) else 1.0,
        )

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / self.steps_per_epoch[0]

    @property
    def supervised_per_step(self) -> float:
        """Supervised tokens in an average step of the first epoch: the automatic learning rate depends on it."""
        return self.num_supervised / self.steps_per_epoch[0]


@dataclass(eq=False)
class Loader:
    """Makes the steps of a run. Every epoch is planned once at construction, so the number of steps is exact.

    `epochs` >= 1, `max_steps` 0: no cap. `pad`: every batch has exactly `token_budget` tokens. `fix_documents`: and as
    many documents as the run's fullest bin, so that a compiler meets few shapes. `multiple`: tokens, where not `pad`,
    and supervised rows of a batch are filled up to a multiple of it. `pin`: in page-locked memory, from which
    `PackedBatch.to` copies without waiting.
    `mixture`: which sequences an epoch takes; without it, all. `costs` (S,) float: the work of each sequence, which is
    balanced over the bins of a step. `conditions`: under which each is trained; without it, its own. Memory: two plans,
    each of 8 bytes a sequence, and 4 more with `conditions`. Raises ConfigError for impossible settings, DataError for
    a sequence longer than a bin and for a data set without sequences.

    The cooldown without conditions begins with step `cooldown` (num_steps: never): the steps before it are those that
    the run would have without a cooldown, and what is left of their epoch is packed anew, as are later epochs. So all
    of the epoch is trained on once, and the lengths that are packed are exact.
    """

    dataset: TokenDataset
    _: KW_ONLY
    token_budget: int
    bins_per_step: int
    seed: int = 0
    epochs: int = 1
    max_steps: int = 0
    rank: int = 0
    world: int = 1
    pad: bool = False
    fix_documents: bool = False
    multiple: int = 1
    pin: bool = False
    mixture: Mixture | None = None
    costs: NDArray[np.floating] | None = None
    conditions: ConditionDraws | None = None

    def __post_init__(self) -> None:
        bins, world = self.bins_per_step, self.world
        assert 0 <= self.rank < world, f"rank {self.rank} of {world}"
        if bins < 1 or bins % world:
            raise ConfigError(
                f"data.bins_per_step is {bins}, which {world} processes cannot share evenly: "
                f"use a multiple of {world}, such as {max(round(bins / world), 1) * world}"
            )
        _check_lengths(self.dataset, self.token_budget)
        self.pad_to = self.token_budget if self.pad else None
        self._under = lru_cache(multipack.KEPT)(self.conditions) if self.conditions else None
        self._cools_from = (self.epochs, 0)  # epoch and step in it
        self._plan_all()
        self.cooldown = self.num_steps
        if self.conditions and self.conditions.last:
            self.cooldown -= max(round(self.conditions.last * self.num_steps), 1)
            self._cools_from = self.position(self.cooldown)
            self._plan_all()

    def _plan_all(self) -> None:
        """Count the steps of every epoch."""
        self.plan = EpochPlanCache(self._plan)
        counts = [self._count(epoch) for epoch in reversed(range(self.epochs))]  # so that the first two stay planned
        self.steps_per_epoch = tuple(steps for steps, _ in reversed(counts))  # before `max_steps` cuts them
        self.num_documents = max(most for _, most in counts) if self.fix_documents else None
        self._epoch_starts = np.concatenate([[0], np.cumsum(self.steps_per_epoch)])
        total = int(self._epoch_starts[-1])
        self.num_steps = min(total, self.max_steps or total)

    def _plan(self, epoch: int) -> PackPlan:
        taken, (cool_epoch, step) = None if self.mixture is None else self.mixture(epoch), self._cools_from
        if epoch < cool_epoch:
            return self._pack(epoch, taken, self._under(epoch) if self._under else None)
        without = np.full(len(self.dataset), NONE, np.int32)
        if epoch > cool_epoch or step == 0:
            return self._pack(epoch, taken, without)
        assert self._under is not None, "a cooldown has conditions"
        before = self._pack(epoch, taken, self._under(epoch))
        left = before.indices[before.bin_offsets[step * self.bins_per_step] :]
        return multipack.joined(before, step, self._pack(epoch, left, without))

    def plan_before_cooldown(self) -> PackPlan:
        """How the first epoch would be packed without a cooldown, which changes no step in front of it."""
        if self._cools_from[0]:
            return self.plan(0)
        return self._pack(0, self.mixture(0) if self.mixture else None, self._under(0) if self._under else None)

    def _pack(self, epoch: int, taken: NDArray[np.int64] | None, under: NDArray[np.int32] | None) -> PackPlan:
        """Pack the sequences `taken` (None: all), `under` these conditions (None: their own)."""
        lengths = self.dataset.lengths if under is None else self.dataset.lengths_under(under)
        costs = self.costs
        if taken is not None:
            lengths, costs = lengths[taken], None if costs is None else costs[taken]
        plan = multipack.plan(
            lengths,
            token_budget=self.token_budget,
            bins_per_step=self.bins_per_step,
            seed=self.seed,
            epoch=epoch,
            costs=costs,
        )
        return plan if taken is None else replace(plan, indices=taken[plan.indices])

    def _count(self, epoch: int) -> tuple[int, int]:
        """Steps of an epoch, and the most documents of a padded bin."""
        plan = self.plan(epoch)
        return plan.num_steps, most_documents(np.diff(plan.bin_offsets), plan.bin_tokens, self.token_budget)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step, both from 0. Raises IndexError outside the run."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a run of {self.num_steps} steps")
        epoch = int(np.searchsorted(self._epoch_starts, step, side="right")) - 1
        return epoch, step - int(self._epoch_starts[epoch])

    def epoch_end(self, step: int) -> bool:
        """True if `step` is the last of its epoch."""
        epoch, step_in_epoch = self.position(step)
        return step_in_epoch == self.steps_per_epoch[epoch] - 1

    def step(self, step: int) -> list[PackedBatch]:
        """This rank's `bins_per_step / world` micro-batches of a global step; empty bins hold padding alone."""
        epoch, step_in_epoch = self.position(step)
        plan = self.plan(epoch)
        first = step_in_epoch * self.bins_per_step
        bins = range(first + self.rank, first + self.bins_per_step, self.world)
        return [self._batch(plan.bin(b), self._conditions_of(plan.bin(b), step)) for b in bins]

    def _conditions_of(self, indices: NDArray[np.int64], step: int) -> NDArray[np.int32] | None:
        """Under what a step trains these sequences; None: their own conditions."""
        if step >= self.cooldown:
            return np.full(len(indices), NONE, np.int32)
        return None if self._under is None else self._under(self.position(step)[0])[indices]

    def _batch(self, indices: NDArray[np.int64], under: NDArray[np.int32] | None) -> PackedBatch:
        shape = {"pad_to": self.pad_to, "num_documents": self.num_documents, "multiple": self.multiple}
        batch = self.dataset.batch(indices, under, **shape)
        return batch.pin_memory() if self.pin else batch

    def iterate(self, start_step: int = 0, *, prefetch: int = 2) -> Generator[tuple[int, list[PackedBatch]]]:
        """(step, batches) from `start_step` on; a thread prepares `prefetch` steps ahead and ends with the generator.

        Nothing of earlier steps is read. Another thread plans the next epoch during the current one. Raises what making
        a step raised.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        steps = range(start_step, self.num_steps)
        ahead, waiting = iter(steps), deque[Future[list[PackedBatch]]]()
        try:
            for step in steps:
                for each in itertools.islice(ahead, prefetch + 1 - len(waiting)):
                    waiting.append(pool.submit(self._prepare, each))
                yield step, waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> list[PackedBatch]:
        """Make a step, and have the next epoch planned before it begins, unless `max_steps` ends the run first."""
        epoch = self.position(step)[0]
        self.plan(epoch)  # in use, so the cache keeps it when the next one comes
        following = epoch + 1
        if following < len(self.steps_per_epoch) and self._epoch_starts[following] < self.num_steps:
            self.plan.start(following)
        return self.step(step)

    def stats(self) -> LoaderStats:
        """Counts of the data and of the first epoch's plan."""
        plan = self.plan(0)
        supervised = self.dataset.supervised if self.mixture is None else self.dataset.supervised[plan.indices]
        return LoaderStats.of(plan, int(supervised.sum()), self.steps_per_epoch, self.num_steps)


def _check_lengths(dataset: TokenDataset, token_budget: int) -> None:
    if len(dataset) == 0:
        raise DataError(f"{dataset.path}: no conversation is left to train on")
    longest = int(np.argmax(dataset.lengths))
    if dataset.lengths[longest] > token_budget:
        over = int((dataset.lengths > token_budget).sum())
        raise DataError(
            f"{dataset.source_location(longest)}: a conversation of {dataset.lengths[longest]} tokens is longer than "
            f"data.token_budget = {token_budget} ({over} such in {dataset.path}): raise the budget, or prepare with a "
            "smaller --context"
        )
