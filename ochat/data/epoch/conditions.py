"""Draw the condition that each conversation is trained under in an epoch: a pure function of (seed, epoch, index).

    draws = ConditionDraws(dataset, config.condition, seed=0)
    draws(epoch)        # (S,) of OWN, or NONE for those that are trained without condition

Dropout teaches the model to answer without a condition too, which guidance needs (RECAP, arXiv 2511.14759; CFGRL,
arXiv 2505.23458). The cooldown at the end of a run (MeCo, arXiv 2501.01956) is the loader's: whole steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ochat.config import ConditionConfig
from ochat.data.dataset import TokenDataset
from ochat.text.prefixes import NONE, OWN

KEY = 0x636F6E64  # keeps these draws apart from those that order the data


class ConditionDraws:
    """Calling it with an epoch gives (S,) int32. `last`: the share of the run's steps at its end without condition.

    Raises: DataError for a data set that does not say where its prefixes are, ConfigError for one without conditions.
    """

    def __init__(self, data: TokenDataset, config: ConditionConfig, seed: int = 0) -> None:
        self.dropout, self.last, self.seed = config.dropout, config.last, seed
        self._indices = data.indices  # in the whole data set: a selection changes no other conversation's draw
        for option, share in (("condition.dropout", self.dropout), ("condition.last", self.last)):
            if share:
                data.check_exchangeable(f"{option} = {share:g}")

    def __call__(self, epoch: int) -> NDArray[np.int32]:
        """The condition of each conversation in an epoch."""
        under = np.full(len(self._indices), OWN, np.int32)
        if self.dropout:
            drawn = np.random.default_rng([self.seed, epoch, KEY]).random(int(self._indices[-1]) + 1)
            under[drawn[self._indices] < self.dropout] = NONE
        return under
