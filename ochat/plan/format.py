"""Durations and rates as a plan prints them, with the digits that a prediction has."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """0.35 s, 12 s, 7 min, 3.4 h, 2.1 days."""
    for limit, unit, size, digits in ((1, "s", 1, 2), (100, "s", 1, 1), (5400, "min", 60, 0), (172800, "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def rounded(rate: float) -> str:
    """Three digits: a prediction has no more."""
    rate = float(f"{rate:.3g}")
    return f"{rate:,.0f}" if rate < 1e6 else f"{rate / 1e6:,.3g} M"
