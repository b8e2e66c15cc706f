"""Show what `ochat ablate` measured: charts and tables of expert answers under each class's prefix, a row a variant.

charts, tables = ablation.shown(ablation.read(Path("runs/ablation")))
"""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from ochat.errors import DataError
from ochat.evaluate import intervals
from ochat.evaluate.ablate.table import ABOVE, SIDES, TABLE
from ochat.files import bounded_json
from ochat.report.charts import Chart, figure, scatter
from ochat.report.tables import Table

ADVICE = "name a folder of `ochat ablate`, or run it again"
MEASURES = {
    "exact": ("Exact match of expert answers", "share of prompts", ".1%"),
    "nll": ("nll of expert answers", "nats a token", ".3f"),
}


def read(folder: Path) -> dict[str, Any]:
    """The table.json of an ablation. Raises: DataError where it is missing or damaged."""
    try:
        return bounded_json.read_object(folder / TABLE, DataError, ADVICE) | {"path": folder / TABLE}
    except FileNotFoundError:
        raise DataError(f"{folder}: no {TABLE} is there; {ADVICE}") from None


def shown(record: dict[str, Any]) -> tuple[list[Chart], list[Table]]:
    """A chart and a table of each measure. Raises: DataError for another kind of table."""
    try:
        return [_chart(record, each) for each in MEASURES], [_table(record, each) for each in MEASURES]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{record['path']}: not what `ochat ablate` writes ({error!r}); {ADVICE}") from None


def _ends(cell: dict[str, Any]) -> tuple[float, float, float]:
    """(mean, low, high); without an interval all are the mean. Raises: ValueError for a value that is not finite."""
    mean, (low, high) = cell["mean"], cell["interval"] or (cell["mean"], cell["mean"])
    ends = float(mean), float(low), float(high)
    if not all(map(math.isfinite, ends)):
        raise ValueError("a mean or an interval is not finite")
    return ends


def _chart(record: dict[str, Any], measure: str) -> Chart:
    title, unit, form = MEASURES[measure]
    traces = [_trace(record, measure, side, slot) for slot, side in enumerate(SIDES)]
    axis = {"tickformat": ".0%", "range": [-0.03, 1.03]} if form.endswith("%") else {}
    return Chart(title, unit, figure(traces, axis, {"autorange": "reversed", "nticks": 0}, hovermode="closest",
                                     showlegend=True))  # fmt: skip


def _trace(record: dict[str, Any], measure: str, side: str, slot: int) -> go.Scatter:
    shown = {row["title"]: _ends(row[measure][side]) for row in record["rows"] if row[measure][side]}
    bars = {
        "type": "data", "symmetric": False,
        "array": [high - mean for mean, _, high in shown.values()],
        "arrayminus": [mean - low for mean, low, _ in shown.values()],
    }  # fmt: skip
    means, variants = [mean for mean, *_ in shown.values()], [html.escape(title, quote=False) for title in shown]
    label = _heading(record, side)
    return scatter(label, means, variants, slot, error_x=bars, mode="markers", marker={"size": 10})


def _heading(record: dict[str, Any], side: str) -> str:
    return f"under the prefix of {record[side]}"


def _table(record: dict[str, Any], measure: str) -> Table:
    title, unit, form = MEASURES[measure]
    columns = [(side, form) for side in SIDES] + [(ABOVE, f"+{form}")]
    rows = [
        [row["title"], str(len(row["seeds"])), *(_cell(row[measure][side], each) for side, each in columns)]
        for row in record["rows"]
    ]
    headings = ["variant", "seeds", *(_heading(record, side) for side in SIDES), "less C-RLFT"]
    note = f"{unit}, mean over seeds [interval]. A variant without a condition has one prefix, which names no class."
    return Table(f"Ablation: {title}", headings, rows, note=note.capitalize())


def _cell(cell: dict[str, Any] | None, form: str) -> str:
    if cell is None:
        return "-"
    mean, *ends = _ends(cell)
    return intervals.shown(mean, ends if cell["interval"] else None, form)
