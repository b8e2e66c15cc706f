"""What `ochat ablate` measured, as charts and tables: a row a variant, expert answers under either class's prefix.

charts, tables = Ablation.read(Path("runs/laboratory")).shown()
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat import json_file
from ochat.errors import DataError
from ochat.report.charts import Chart
from ochat.report.curves import SYMBOLS, Trace
from ochat.report.tables import Table

TABLE = "table.json"
ADVICE = "name a folder of `ochat ablate`, or run it again"
MEASURES = {
    "exact": ("Exact match of expert answers", "share of prompts", ".1%"),
    "nll": ("nll of expert answers", "nats a token", ".3f"),
}
SHARES = [-0.03, 1.03]  # an axis with room for the marks at its ends
LESS_OURS = "above_ours"  # the difference to C-RLFT


@dataclass(frozen=True)
class Ablation:
    """The table.json of a laboratory."""

    path: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Ablation:
        """Raises: DataError where there is no such table, or it is damaged."""
        path = folder / TABLE
        try:
            return cls(path, json_file.read_object(path, DataError, ADVICE))
        except FileNotFoundError:
            raise DataError(f"{folder}: no {TABLE} is there; {ADVICE}") from None

    def shown(self) -> tuple[list[Chart], list[Table]]:
        """Of each measure a chart, with a mark and an interval for each variant and prefix, and a table.

        Raises: DataError for another kind of table.
        """
        try:
            charts = [_chart(self.record, measure) for measure in MEASURES]
            return charts, [_table(self.record, measure) for measure in MEASURES]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self.path}: not what `ochat ablate` writes ({error!r}); {ADVICE}") from None


def _sides(record: dict[str, Any]) -> list[tuple[str, str]]:
    """The columns: whose prefix, and the difference to C-RLFT."""
    names = [(side, f"under the prefix of {record[side]}") for side in ("expert", "suboptimal")]
    return [*names, (LESS_OURS, "less C-RLFT")]


def _ends(cell: dict[str, Any]) -> tuple[float, float, float]:
    """(mean, low, high); where there is no interval all are the mean. Raises: ValueError for what is no number."""
    low, high = cell["interval"] or (cell["mean"], cell["mean"])
    mean, low, high = float(cell["mean"]), float(low), float(high)
    if not all(map(math.isfinite, (mean, low, high))):
        raise ValueError("a mean or an interval that is no number")
    return mean, low, high


def _chart(record: dict[str, Any], measure: str) -> Chart:
    title, unit, form = MEASURES[measure]
    rows, sides = record["rows"], _sides(record)[:2]
    traces = [_trace(rows, measure, side, label, slot) for slot, (side, label) in enumerate(sides)]
    axis = {"tickformat": ".0%", "range": SHARES} if form.endswith("%") else {"rangemode": "normal"}
    layout = {
        "xaxis": axis | {"title": {"text": unit}},
        "yaxis": {"autorange": "reversed"},
        "hovermode": "closest",
        "showlegend": True,
    }
    return Chart(title, unit, traces, layout)


def _trace(rows: list[dict[str, Any]], measure: str, side: str, label: str, slot: int) -> Trace:
    cells = [(html.escape(row["title"], quote=False), _ends(row[measure][side])) for row in rows if row[measure][side]]
    means, lows, highs = ([ends[i] for _, ends in cells] for i in range(3))
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [high - mean for mean, high in zip(means, highs, strict=True)],
        "arrayminus": [mean - low for mean, low in zip(means, lows, strict=True)],
    }
    return {
        "type": "scatter",
        "x": means,
        "y": [variant for variant, _ in cells],
        "error_x": bars,
        "name": html.escape(label, quote=False),
        "mode": "markers",
        "marker": {"symbol": SYMBOLS[slot], "size": 10},
        "meta": {"slot": slot},
    }


def _table(record: dict[str, Any], measure: str) -> Table:
    title, unit, form = MEASURES[measure]
    sides = _sides(record)
    rows = [
        [str(row["title"]), f"{len(row['seeds'])}", *(_shown(row[measure][side], form, side) for side, _ in sides)]
        for row in record["rows"]
    ]
    headings = ["variant", "seeds", *(label for _, label in sides)]
    note = f"{unit}, mean over seeds [interval]. A variant without a condition has one prefix, which names no class."
    return Table(f"Ablation: {title}", headings, rows, note=note.capitalize())


def _shown(cell: dict[str, Any] | None, form: str, side: str) -> str:
    if cell is None:
        return "-"
    sign = "+" if side == LESS_OURS else ""
    mean, low, high = (format(end, sign + form) for end in _ends(cell))
    return f"{mean} [{low}, {high}]" if cell["interval"] else mean
