"""Draw the condition that each conversation is trained under in an epoch: a pure function of (seed, epoch, index).

    draws = ConditionDraws(dataset, config.condition, seed=0)
    draws(epoch)        # (S,) of OWN, NONE for those that are trained without condition, or a class

Dropout teaches the model to answer without a condition too, which guidance needs (RECAP, arXiv 2511.14759; CFGRL,
arXiv 2505.23458). The cooldown at the end of a run (MeCo, arXiv 2501.01956) is the loader's: whole steps. Goals "at
least" (arXiv 2605.16345): an answer of reward r is one under each goal of at most r.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ochat.config import ConditionConfig
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError
from ochat.text.prefixes import NONE, OWN

DROPOUT, GOALS = 0x636F6E64, 0x676F616C  # keep these draws apart, and from those that order the data


class ConditionDraws:
    """Calling it with an epoch gives (S,) int32. `last`: the share of the run's steps at its end without condition.

    Raises: DataError for a data set that does not say where its prefixes are, ConfigError for one without conditions.
    """

    def __init__(self, data: TokenDataset, config: ConditionConfig, seed: int = 0) -> None:
        self.dropout, self.last, self.seed, self.goals = config.dropout, config.last, seed, config.goals
        self._indices = data.indices  # in the whole data set: a selection changes no other conversation's draw
        for option, share in (("condition.dropout", self.dropout), ("condition.last", self.last)):
            if share:
                data.check_exchangeable(f"{option} = {share:g}")
        self._levels, self._ranks = _levels(data) if self.goals == "at_least" else (None, None)

    def __call__(self, epoch: int) -> NDArray[np.int32]:
        """The condition of each conversation in an epoch."""
        under = np.full(len(self._indices), OWN, np.int32)
        if self._levels is not None and self._ranks is not None:
            goals = (self._draw(epoch, GOALS) * (self._ranks + 1)).astype(np.int64)
            under[:] = self._levels[goals]
        if self.dropout:
            under[self._draw(epoch, DROPOUT) < self.dropout] = NONE
        return under

    def _draw(self, epoch: int, key: int) -> NDArray[np.float64]:
        """(S,) numbers from 0 to 1, each decided by seed, epoch, key and the place in the whole data set."""
        return np.random.default_rng([self.seed, epoch, key]).random(int(self._indices[-1]) + 1)[self._indices]


def _levels(data: TokenDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The classes from the lowest reward on, as places in class_names, and (S,) the rank of each conversation's."""
    asked = 'condition.goals = "at_least"'
    if not data.levels:
        raise ConfigError(f"{asked}: {data.path} has no classes of rewards: prepare it with --condition-from reward")
    if any(one.manifest.get("condition_from") != data.manifest["condition_from"] for one in data.prepared):
        raise ConfigError(
            f"{asked}: the sets of [data.mix] have other classes of rewards: prepare them with the same --bins"
        )
    data.check_exchangeable(asked, data.levels)
    levels = np.array([data.class_names.index(name) for name in data.levels])
    ranks = np.full(len(data.class_names), -1)
    ranks[levels] = np.arange(len(levels))
    return levels, ranks[data.class_ids]
