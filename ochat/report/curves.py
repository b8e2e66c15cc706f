"""Make a metric's column small enough for a page, and smooth it.

thin(steps, losses, 1600)        # at most 1,600 of the points, the lowest and highest of each stretch among them
moving_mean(losses, 41)          # mean of each value's 41 nearest
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # (n,) steps and values; NaN: no value


def thin(x: NDArray[np.float64], y: NDArray[np.float64], most: int) -> Points:
    """At most `most` of the points, unchanged and in order: the first, the last, and each stretch's extremes."""
    if len(x) <= most:
        return x, y
    kept = {0, len(y) - 1}
    for start, end in pairwise(np.linspace(0, len(y), max(most // 2, 1)).astype(int)):
        stretch = y[start:end]
        if np.isfinite(stretch).any():
            kept |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    places = sorted(kept)
    return x[places], y[places]


def moving_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """(n,): the mean of the finite values at most window / 2 places away; NaN where there is none."""
    is_finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_finite, y, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(is_finite)])
    places = np.arange(len(y))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
