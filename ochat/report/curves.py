"""A column as a curve for Plotly: few enough points for a page, and no spike lost.

    thin(steps, losses, 1600)                   # the lowest and the highest of each of 800 stretches, as they are
    traces("GPT4", steps, losses, slot=1, most=1600, is_noisy=True)     # faint points and their moving mean

A thinned curve looks like the whole one: each stretch of steps keeps its lowest and its highest point, which are the
file's own numbers.
"""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star-triangle-down", "hexagon2")
MEAN_FROM = 60  # points; fewer are shown as they are
MARKERS = 9  # shown on a curve of many points

Trace = dict[str, Any]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], most: int) -> tuple[list[float], list[float | None]]:
    """At most `most` (even, from 4 up) of the points (n,), in order; None for a y that is no number."""
    if len(x) > most:
        kept = _extremes(y, most // 2 - 1)
        x, y = x[kept], y[kept]
    return [_plain(each) for each in x], [_plain(each) if math.isfinite(each) else None for each in y]


def moving_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """(n,): the mean of the numbers at most window / 2 places away; NaN where there is none."""
    is_number = np.isfinite(y)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(each)]) for each in (np.where(is_number, y, 0.0), is_number.astype(float))
    )
    places = np.arange(len(y))
    low, high = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def window_of(num_points: int) -> int:
    """Points that a moving mean is of: a fortieth of the curve."""
    return max(num_points // 40, 5) | 1


def traces(
    label: str, x: NDArray[np.float64], y: NDArray[np.float64], *, slot: int, most: int, is_noisy: bool
) -> list[Trace]:
    """The points (n,) as one trace, or, of many noisy ones, faint beside their moving mean. `slot`: which colour, dash
    and symbol.

    A class or a folder may be called anything, and Plotly reads tags in names: they are escaped.
    """
    xs, ys = thin(x, y, most)
    name = html.escape(label, quote=False)
    look = {"dash": DASHES[slot % len(DASHES)], "width": 2}
    marker = {"symbol": SYMBOLS[slot % len(SYMBOLS)], "size": 7}
    common = {"type": "scatter", "name": name, "legendgroup": str(slot), "meta": {"slot": slot}}
    if len(x) < MEAN_FROM or not is_noisy:
        marker = marker | ({"maxdisplayed": MARKERS} if len(x) >= MEAN_FROM else {})
        return [common | {"x": xs, "y": ys, "mode": "lines+markers", "line": look, "marker": marker}]
    points = common | {"x": xs, "y": ys, "mode": "lines", "line": {"width": 1}, "opacity": 0.3, "showlegend": False}
    xs, ys = thin(x, moving_mean(y, window_of(len(y))), most)
    marker = marker | {"maxdisplayed": MARKERS}
    mean = common | {"x": xs, "y": ys, "mode": "lines+markers", "line": look, "marker": marker, "hoverinfo": "skip"}
    return [points, mean]


def _extremes(y: NDArray[np.float64], num_stretches: int) -> NDArray[np.int64]:
    """Places of the first, the last, and the lowest and highest number of each stretch; of one without numbers none."""
    edges = np.linspace(0, len(y), num_stretches + 1).astype(np.int64)[:-1]
    is_number = np.isfinite(y)
    places = [np.array([0, len(y) - 1])]
    for fill, reduce in ((np.inf, np.minimum), (-np.inf, np.maximum)):
        filled = np.where(is_number, y, fill)
        ends = np.repeat(reduce.reduceat(filled, edges), np.diff(np.append(edges, len(y))))
        found = np.flatnonzero((filled == ends) & is_number)
        stretch = np.searchsorted(edges, found, side="right")
        places.append(found[np.unique(stretch, return_index=True)[1]])
    return np.unique(np.concatenate(places))


def _plain(value: np.float64) -> float | int:
    """The shortest JSON of the same number."""
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number
