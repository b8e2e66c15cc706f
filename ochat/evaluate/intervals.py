"""Confidence intervals: of shares (Wilson's score interval) and of means over a few seeds (Student's t).

    wilson(0.31, 254)                       # (low, high)
    mean_of([0.98, 0.99, 0.97])             # {"mean": 0.98, "interval": [0.955, 1.005], "values": [...]}

Wilson's interval stays inside [0, 1], and is right for few questions and where all or none were answered. A score of
0.5, a tie, makes the true spread smaller than Wilson assumes: with ties the interval is wider than needed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

LEVEL, Z = 0.95, 1.959964  # the normal distribution's 97.5 % point
METHOD = "Wilson's score interval"


def wilson(share: float, count: float) -> tuple[float, float]:
    """The interval of a mean of `count` independent scores in [0, 1]; of an effective number of them, any float."""
    if not count:
        return 0.0, 1.0
    shrunk = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(min(shrunk - half, share), 0.0), min(max(shrunk + half, share), 1.0)  # rounding aside


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean, t interval at LEVEL (mean -+ t s / sqrt(n); None for one value) and the values. Needs scipy."""
    count, interval = len(values), None
    mean = statistics.fmean(values)
    if count > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "values": list(values)}


def shown(value: float, ends: Sequence[float] | None, form: str, scale: float = 1, join: str = " ") -> str:
    """A value times `scale` and, where there is one, its interval: "31.0 [25.6, 36.9]"."""
    text, *texts = (format(scale * each, form) for each in (value, *(ends or ())))
    return f"{text}{join}[{', '.join(texts)}]" if texts else text
