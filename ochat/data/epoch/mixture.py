"""Mix data sets: choose the conversations of each that an epoch trains on. A pure function of (sets, seed, epoch).

    mixture = Mixture(data, {"chat": MixConfig("data/chat", epochs=0.5), "code": MixConfig("data/code", tokens=10**7)})
    mixture(epoch)      # indices into data, some twice if an epoch passes over a set twice

A set is an endless stream of passes, each with every conversation once in a new order; an epoch takes the next piece of
it. So half a pass is the other half in the next epoch, and no conversation comes a third time before all came twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ochat.config import MixConfig
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError


class Mixture:
    """Calling it with an epoch gives int64 indices into `data`, set by set.

    `shares` says what an epoch takes of each of the data's sets: passes (`epochs`, 1 if nothing is said), `tokens`, or
    a `ratio`: the sets that have one share their tokens in these proportions, as many as use up the first of them.
    Raises ConfigError for a set of which the selection leaves nothing. Costs: O(conversations) an epoch, nothing kept.
    """

    def __init__(self, data: TokenDataset, shares: Mapping[str, MixConfig], seed: int = 0) -> None:
        self.seed = seed
        self.parts = {name: (data.lengths[part], part.start) for name, part in data.sets.items()}
        self.totals = {name: int(lengths.sum()) for name, (lengths, _) in self.parts.items()}
        for name, total in self.totals.items():
            if not total:
                raise ConfigError(
                    f"data.mix.{name}: only_class and subsample leave no conversation of it: leave it out"
                )
        self.budgets = token_budgets(self.totals, shares)

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """The epoch's conversations, in no particular order. Raises ConfigError if there are none."""
        taken = [
            start + stretch(lengths, round(epoch * budget), round((epoch + 1) * budget), (self.seed, _key(name)))
            for (name, (lengths, start)), budget in zip(self.parts.items(), self.budgets.values(), strict=True)
        ]
        if not sum(map(len, taken)):
            raise ConfigError(f"epoch {epoch + 1} takes no conversation of any set: raise epochs or tokens in data.mix")
        return np.concatenate(taken)


def token_budgets(totals: Mapping[str, int], shares: Mapping[str, MixConfig]) -> dict[str, float]:
    """Tokens that an epoch takes of each set; `totals`: those it holds."""
    rates = {name: share.ratio for name, share in shares.items() if share.ratio is not None}
    used_up = min((totals[name] / rate for name, rate in rates.items()), default=0.0)
    budgets = {}
    for name, share in shares.items():
        if share.ratio is not None:
            budgets[name] = share.ratio * used_up
        elif share.tokens is not None:
            budgets[name] = float(share.tokens)
        else:
            budgets[name] = totals[name] * (1.0 if share.epochs is None else share.epochs)
    return budgets


def stretch(lengths: NDArray[np.int64], begin: int, end: int, seed: tuple[int, int]) -> NDArray[np.int64]:
    """Sequences whose first token is one of begin ... end - 1 in the stream of passes over `lengths` (n,)."""
    total = int(lengths.sum())
    taken = [np.zeros(0, np.int64)]
    for number in range(begin // total, -(-end // total)):
        first = number * total
        if begin <= first and first + total <= end:
            taken.append(np.arange(len(lengths)))
            continue
        order = np.random.default_rng([*seed, number]).permutation(len(lengths))
        starts = first + np.cumsum(lengths[order]) - lengths[order]
        taken.append(order[(begin <= starts) & (starts < end)])
    return np.concatenate(taken)


def _key(name: str) -> int:
    return zlib.crc32(name.encode())  # of the name, so that adding a set changes nothing in the others
