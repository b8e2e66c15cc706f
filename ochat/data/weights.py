"""Turn what a span carries (role, own weight, class, reward) into the weight that its tokens train with.

    rule = WeightRule(config.weights, config.classes, class_names=("GPT4", "GPT3"))
    rule(own, roles, class_ids, rewards, num_tokens)  -> (n,) float32, one weight per span

A span is supervised if its own weight is not 0; a missing weight counts as 1 for the assistant and 0 for all other
roles. So an explicit 0 keeps an answer out of training for every source, and a class decides how much an answer counts,
never which answers do. A token weight (`ochat prepare --token-weights`) is a factor on what the source gives: 0.3 under
a class of weight 0.1 is 0.03, while a record's own 0.3 gives way to the class's 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.config import ClassConfig, WeightsConfig
from ochat.errors import ConfigError
from ochat.text.token_weights import DEFAULT_WEIGHTS, MAX_WEIGHT, ROLES

ASSISTANT = ROLES.index("assistant")
FACTORS = "span_factors"  # the column of token weights, which only some data sets have


def class_weight(config: ClassConfig, name: str, default_beta: float) -> float:
    """`weight`, or `exp((reward - 1) / beta)`; the configuration has exactly one of them. Raises ConfigError unless the
    result is a number of at most MAX_WEIGHT."""
    if config.weight is not None:
        weight, remedy = float(config.weight), "set another weight"
    else:
        assert config.reward is not None, "the configuration checks it"
        weight = float(reward_weights(config.reward, default_beta if config.beta is None else config.beta))
        remedy = "lower its reward or raise beta"
    if are_unusable(weight):
        raise ConfigError(
            f"[classes.{name}] gives the weight {weight:.3g}; needed is a finite one up to {MAX_WEIGHT:g}: {remedy}"
        )
    return weight


def are_unusable(weights: ArrayLike) -> NDArray[np.bool_]:
    """Which weights are NaN, infinite, or so large that a sum of them could be infinite in float32."""
    return ~(np.abs(weights) <= MAX_WEIGHT)


class WeightRule:
    """The weights section and the [classes] table, resolved against the classes of one data set.

    `present` are the classes whose conversations are used; each needs an entry if the table decides. Raises
    ConfigError.
    """

    def __init__(
        self,
        config: WeightsConfig,
        classes: Mapping[str, ClassConfig],
        class_names: Sequence[str],
        present: Sequence[str] | None = None,
    ) -> None:
        self.source = config.source if config.source != "auto" else ("classes" if classes else "record")
        self.beta = config.beta
        self.per_message_mean = config.per_message_mean
        self.per_conversation_mean = config.per_conversation_mean
        self.needs_reward = self.source == "reward"
        table = {name: class_weight(entry, name, config.beta) for name, entry in classes.items()}
        if self.source == "classes":
            _check_complete(table, class_names if present is None else present)
        self.by_class = np.array([table.get(name, np.nan) for name in class_names] or [np.nan], np.float32)

    def __call__(
        self,
        own: NDArray[np.float32],
        roles: NDArray[np.uint8],
        class_ids: NDArray[np.integer],
        rewards: NDArray[np.float32],
        num_tokens: NDArray[np.integer],
        factors: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Weights (n,) float32 of n spans.

        `own` NaN where the record gives none; `class_ids` and `rewards` (NaN: none) of the span's conversation;
        `num_tokens` among which a mean shares the weight, after truncation: all of the span's message, or the
        supervised labels of its conversation. `factors`: its token weight; None: 1 for all. With `classes` and `reward`
        a negative own weight lends its sign.
        """
        weights = own_weights(own, roles)
        supervised = weights != 0
        if self.source in ("classes", "reward"):
            by_reward = self.source == "reward"
            given = reward_weights(rewards, self.beta) if by_reward else self.by_class[class_ids]
            weights = np.where(supervised, np.copysign(1, weights) * given, 0)
        elif self.source == "none":
            weights = supervised
        if self.per_message_mean or self.per_conversation_mean:
            weights = weights / np.maximum(num_tokens, 1)
        if factors is not None:
            weights = weights * factors
        return np.asarray(weights, np.float32)


def own_weights(own: NDArray[np.float32], roles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Weights (n,) float32 of spans before those of classes and rewards: `own`, or the role's where it is NaN."""
    return np.where(np.isnan(own), DEFAULT_WEIGHTS[roles], own).astype(np.float32)


def reward_weights(rewards: ArrayLike, beta: float) -> NDArray[np.float64]:
    """exp((reward - 1) / beta) of each reward."""
    with np.errstate(over="ignore"):  # the caller names the class or the record of a weight that is too large
        return np.exp((np.asarray(rewards, np.float64) - 1) / beta)


def _check_complete(table: Mapping[str, float], present: Sequence[str]) -> None:
    if not table:
        raise ConfigError('weights.source is "classes", but the configuration has no [classes.NAME] section')
    missing = [name for name in present if name not in table]
    if missing:
        raise ConfigError(
            f"the data has the class {missing[0]!r}, but [classes] only has {', '.join(map(repr, table))}: "
            f'add [classes."{missing[0]}"] with a reward or a weight'
        )
