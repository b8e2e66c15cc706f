"""Intervals of shares: accuracies, exact matches, win rates, and averages of them over tasks.

    wilson(0.31, 254)                    # (low, high)
    average([0.31, 0.4], [(0.26, 0.37), (0.36, 0.44)])        # value, (low, high)

Wilson's score interval stays inside [0, 1] and is right for few questions, and where all or none were answered. A score
of 0.5, a tie, only makes the truth's spread smaller than it assumes: with ties it is wider than it must be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

LEVEL, Z = 0.95, 1.959964  # the normal distribution's 97.5 % point
METHOD = "Wilson's score interval"


def wilson(share: float, count: float) -> tuple[float, float]:
    """The interval of a mean of `count` independent scores in [0, 1]; of an effective number of them, any float."""
    if not count:
        return 0.0, 1.0
    shrunk = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(min(shrunk - half, share), 0.0), min(max(shrunk + half, share), 1.0)  # rounding aside


def average(shares: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, tuple[float, float]]:
    """The mean of independent shares, and its interval: their distances to their ends, added as squares (Newcombe)."""
    mean, count = sum(shares) / len(shares), len(shares)
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, intervals, strict=True))) / count
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, intervals, strict=True))) / count
    return mean, (mean - below, mean + above)
