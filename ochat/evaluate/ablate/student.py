"""Mean of a few seeds and its interval, by Student's t: exact for normal errors, and honest about how few they are.

mean_of([0.98, 0.99, 0.97]) -> {"mean": 0.98, "interval": [0.955, 1.005], "values": [...]}
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

LEVEL = 0.95


def mean_of(values: Sequence[float]) -> dict[str, Any]:
    """Mean, interval at LEVEL (mean -+ t s / sqrt(n); None for one value) and the values."""
    count, interval = len(values), None
    mean = statistics.fmean(values)
    if count > 1:
        half = quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval, "values": list(values)}


def quantile(degrees: int, level: float = LEVEL) -> float:
    """t with P(|T| < t) = level, T of Student's distribution with `degrees` of freedom, to 12 digits."""
    low, high = 0.0, 1.0
    while central(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def central(t: float, degrees: int) -> float:
    """P(|T| < t): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    square, is_odd = math.cos(angle) ** 2, degrees % 2
    term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
    for k in range(1 + is_odd, degrees, 2):
        total += term
        term *= k / (k + 1) * square
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total
