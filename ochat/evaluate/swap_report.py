"""Summarise the swap matrix: means over tokens with intervals over conversations, as plain data and as a table.

    record = summarise(swap_matrix(...), conditions);  console.print(swap_table(record, conditions))

Tokens of one conversation depend on each other; conversations (mostly) do not. So whole conversations are resampled
with replacement, and each mean is taken again as a ratio of sums: a percentile bootstrap, because these ratios are
skewed, perplexity most, and a t interval of an accuracy near 1 leaves [0, 1]. All conditions see the same draws, so the
difference of two prefixes is paired, and far more certain than either mean. Intervals of few conversations are too
narrow: at 95 %, for skewed lengths and losses, those of 10, 20, 50 and 100 contained the truth in 85, 88, 92 and 93 %
of 500 draws (those of tests/evaluate/test_swap_report.py; t intervals: 90, 90, 94 and 95 % of 400). Exact match is one
score a conversation, and may be none or all of them, where a bootstrap has no spread: its interval is Wilson's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.evaluate import intervals
from ochat.evaluate.swap import Sums

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
METHOD = f"percentile bootstrap over conversations (exact: {intervals.METHOD})"
SHOWN = {
    "nll": "nll",
    "perplexity": "per-\nplexity",
    "accuracy": "accuracy\n%",
    "exact": "exact\n%",
    "nll_above_own": "nll above\nown prefix",
}


def summarise(matrix: dict[str, Sums], conditions: Sequence[str]) -> dict[str, Any]:
    """{class: {conversations, tokens, prefixes: {condition: {nll, perplexity, accuracy, exact, nll_above_own, each with
    ..._interval}}}}.

    `exact`: the share of conversations that greedy decoding gives word for word, to the end of the turn (Sums.exact).
    `nll_above_own`: the nll less that under the class's own prefix; None where that was not measured. An interval is
    [low, high], or None for a class of one conversation. The same matrix gives the same intervals.
    """
    return {name: _of_class(name, sums, conditions) for name, sums in matrix.items()}


def resampled(columns: NDArray, seed: int = SEED) -> NDArray[np.float64]:
    """(RESAMPLES, m) sums of the columns (n, m) over n rows drawn with replacement. Costs: RESAMPLES * n * m."""
    draw, count = np.random.default_rng(seed), len(columns)
    drawn = (np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([times @ columns.astype(np.float64) for times in drawn])


def swap_table(record: dict[str, Any], conditions: Sequence[str]) -> Table:
    """A row for each class and prefix; the likeliest prefix of a class is marked with *."""
    counts = "; ".join(
        f"{name or '(none)'}: {row['conversations']:,} conversations, {row['tokens']:,} tokens"
        for name, row in record.items()
    )
    what = f"[low, high]: {LEVEL:.0%}, {METHOD}. *: the likeliest prefix. nll: nats per supervised token"
    shown = Table(
        title="Held-out answers of each class under each class's prefix",
        caption=escape(f"{counts}. {what}. exact: conversations whose every token is the likeliest"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # with it, two classes of short names fit 80 columns
    )
    shown.add_column("class", overflow="fold")
    shown.add_column("prefix", overflow="fold")
    for heading in SHOWN.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, row in record.items():
        nll = {condition: row["prefixes"][condition]["nll"] for condition in conditions}
        label = _label(name)
        for condition in conditions:
            star = " *" if nll[condition] == min(nll.values()) else ""
            numbers = [_shown(row["prefixes"][condition], key) for key in SHOWN]
            shown.add_row(label, f"{_label(condition)}{star}", *numbers)
            label = ""
        shown.add_section()
    return shown


def _of_class(name: str, sums: Sums, conditions: Sequence[str]) -> dict[str, Any]:
    columns = np.column_stack([sums.tokens, sums.nll, sums.correct])
    drawn = np.vstack([columns.sum(0), resampled(columns)])  # (1 + RESAMPLES, 1 + 2C), the first row of all as they are
    nll, accuracy = np.split(drawn[:, 1:] / drawn[:, :1], 2, axis=1)
    exact = sums.exact.mean(0, keepdims=True)  # (1, C)
    measures = {"nll": nll, "perplexity": np.exp(nll), "accuracy": accuracy, "exact": exact}
    if name in conditions:
        measures["nll_above_own"] = nll - nll[:, [list(conditions).index(name)]]
    prefixes = {
        condition: _cell({key: values[:, column] for key, values in measures.items()}, len(columns))
        for column, condition in enumerate(conditions)
    }
    return {"conversations": len(columns), "tokens": int(sums.tokens.sum()), "prefixes": prefixes}


def _cell(measures: dict[str, NDArray[np.float64]], count: int) -> dict[str, Any]:
    """Each measure's value and interval, from (1 + RESAMPLES,) values; an exact one's from the value alone."""
    tail = 100 * (1 - LEVEL) / 2
    cell: dict[str, Any] = {}
    for key in SHOWN:
        values = measures.get(key)
        cell[key] = None if values is None else float(values[0])
        ends = None
        if values is not None and count > 1:
            is_share = key == "exact"
            found = intervals.wilson(values[0], count) if is_share else np.percentile(values[1:], [tail, 100 - tail])
            ends = [float(end) for end in found]
        cell[f"{key}_interval"] = ends
    return cell


def _label(name: str) -> str:
    return escape(name) if name else "(none)"


def _shown(cell: dict[str, Any], key: str) -> str:
    """A value above its interval; the intervals of perplexity and exact are only in the record."""
    value, ends = cell[key], cell[f"{key}_interval"]
    if value is None:
        return "-"
    if key in ("perplexity", "exact"):
        return f"{value:,.2f}" if key == "perplexity" else f"{100 * value:.1f}"
    scale, digits = (100, 1) if key == "accuracy" else (1, 3)
    value, *ends = (f"{scale * each:.{digits}f}" for each in (value, *(ends or ())))
    return value + (escape(f"\n[{', '.join(ends)}]") if ends else "")
