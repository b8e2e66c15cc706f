"""Draw the charts of a report as plotly figures. One run: a chart shows its classes. Several: each chart compares them.

    for group in charts.groups(runs): group.title, group.charts[0].figure

Colours have a contrast of at least 3.8 to both a white and a dark page; the page's style sheet colours text and grid.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ochat.checkpoint.measure import ACCURACY, ALL, EXACT, LOSS, Measure, class_label
from ochat.config import HELD_OUT
from ochat.files.jsonl import finite_number
from ochat.report.run_record import RunRecord, class_names

MAX_POINTS, MIN_POINTS = 1600, 200  # of a curve; several runs share the maximum, so that a page stays below 8 MB
MAX_EPOCHS = 20  # more epoch ends than this would hide the curves
MEAN_FROM = 60  # points from which a noisy curve is drawn with its moving mean
MARKERS = 9  # drawn on a curve of many points
LOG_RATIO = 50.0  # largest over smallest value from which an axis is logarithmic
COLORS = ("#2f81c7", "#d0612a", "#1a9068", "#b560a0", "#94790f", "#7474d8", "#d64560", "#76828c")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star-triangle-down", "hexagon2")
DRAWN = (
    "Weighted as in training. Faint: each step (of long runs the lowest and highest of each stretch). Bold: mean over "
    "a fortieth of the run. Dotted verticals: ends of epochs. Drag to zoom, double-click to reset."
)
SHARE = {"tickformat": ".3~p"}
FROM_ZERO = {"rangemode": "tozero"}

Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # (n,) steps and values; NaN: no value


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    unit: str
    figure: go.Figure


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    note: str
    charts: list[Chart]


@dataclass(frozen=True)
class Panel:
    """What one chart shows of a run; for several runs each curve gets a chart of its own."""

    title: str
    unit: str
    curves: Mapping[str, str | Measure]  # label -> a name that _points knows
    yaxis: dict[str, str] = field(default_factory=dict)  # settings of plotly
    may_be_log: bool = False
    is_noisy: bool = True
    shows_epochs: bool = False


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Every chart that has something to show."""
    names, share, nats = class_names(runs), "share of tokens", "nats a token"

    def trained(key: str) -> dict[str, str]:
        return {ALL: key} | {class_label(name): f"classes.{name}.{key}" for name in names}

    def measured(kind: str) -> Mapping[str, Measure]:
        return {ALL: Measure(HELD_OUT, kind)} | {class_label(name): Measure(HELD_OUT, kind, name) for name in names}

    effective = {class_label(name): f"classes.{name}.effective_weight" for name in names}
    rates = {"real": "tokens_per_s", "supervised": "supervised_tokens_per_s", "padded": "padded_tokens_per_s"}
    work = "largest over mean work of a step's bins, first epoch"
    panels = {
        ("Training", DRAWN): [
            Panel("Loss", nats, trained("loss"), may_be_log=True, shows_epochs=True),
            Panel("Accuracy", share, trained("accuracy"), SHARE, shows_epochs=True),
            Panel("Effective weight", "of the class's own", effective, FROM_ZERO, shows_epochs=True),
        ],
        ("Held out", "Measured at every evaluation, on held-out conversations."): [
            Panel("Held-out loss", nats, measured(LOSS)),
            Panel("Held-out accuracy", share, measured(ACCURACY), SHARE),
            *_further_sets(runs),
        ],
        ("Optimizer", ""): [
            Panel("Learning rate", "", {"lr": "lr"}, {"tickformat": ".1e"}, is_noisy=False),
            Panel("Gradient norm", "before clipping", {"gradient norm": "grad_norm"}, may_be_log=True),
        ],
        ("Speed and memory", "Without the time spent in evaluations and checkpoints."): [
            Panel("Tokens a second", "all processes", rates, FROM_ZERO),
            Panel("MFU", "share of the peak", {"MFU": "mfu"}, SHARE | FROM_ZERO),
            Panel("Peak memory", "GiB, rank 0", {"memory": "peak_mem_gib"}, FROM_ZERO, is_noisy=False),
        ],
        ("Packing", ""): [
            Panel("Fill", "real tokens over room in the bins", {"fill": "fill"}, SHARE),
            Panel("Balance", work, {"balance": "balance"}, is_noisy=False),
        ],
    }
    found = [Group(title, note, [*_charts(runs, each)]) for (title, note), each in panels.items()]
    return [group for group in found if group.charts]


def scatter(label: str, x: Any, y: Any, slot: int, **more: Any) -> go.Scatter:
    """A trace with the colour, dash and symbol of its slot. Plotly reads tags in names, so the label is escaped."""
    color = COLORS[slot % len(COLORS)]
    marker = {"symbol": SYMBOLS[slot % len(SYMBOLS)], "size": 7, "color": color} | more.pop("marker", {})
    line = {"dash": DASHES[slot % len(DASHES)], "width": 2, "color": color} | more.pop("line", {})
    more = {"mode": "lines+markers"} | more
    return go.Scatter(
        x=x, y=y, name=html.escape(label, quote=False), legendgroup=str(slot), marker=marker, line=line, **more
    )


def figure(traces: Sequence[go.Scatter], xaxis: dict[str, Any], yaxis: dict[str, Any], **layout: Any) -> go.Figure:
    """The traces in the report's layout."""
    axis = {"automargin": True, "ticklabelstandoff": 4}
    common = {
        "template": None, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
        "font": {"size": 12, "family": "inherit"}, "margin": {"l": 12, "r": 12, "t": 8, "b": 12},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, "hovermode": "x unified",
    }  # fmt: skip
    axes = {"xaxis": axis | xaxis, "yaxis": axis | {"nticks": 6} | yaxis}
    return go.Figure(list(traces), common | axes | layout)


def _further_sets(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for each set of [eval] and kind of number, with a curve for each class."""
    found = dict.fromkeys(m for run in runs for each in run.evaluations for m in each.numbers if m.of != HELD_OUT)
    panels: dict[tuple[str, str], dict[str, Measure]] = {}
    for measure in found:
        label = ALL if measure.name is None else class_label(measure.name)
        panels.setdefault((measure.of, measure.kind), {})[label] = measure
    titles = {
        LOSS: ("loss", "nats a token"),
        ACCURACY: ("accuracy", "share of tokens"),
        EXACT: ("exact match", "share"),
    }
    return [
        Panel(f"{of}: {titles[kind][0]}", titles[kind][1], curves, {} if kind == LOSS else SHARE)
        for (of, kind), curves in panels.items()
    ]


def _points(run: RunRecord, name: str | Measure) -> Points:
    """A measure over the steps of the evaluations; a column of metrics.jsonl over its steps; "fill"; or "balance", the
    first epoch's planned imbalance: the worst step of every few."""
    if isinstance(name, Measure):
        values = [each.numbers.get(name) for each in run.evaluations]
        return np.array([each.step for each in run.evaluations], float), np.array(values, float)
    if name == "balance":
        planned = run.plan.get("imbalance")
        try:
            each, worst = int(planned["steps_each"]), np.array(planned["worst"], float).reshape(-1)  # type: ignore
            return each * np.arange(1, len(worst) + 1, dtype=float), worst
        except (LookupError, TypeError, ValueError, OverflowError):
            return np.zeros(0), np.zeros(0)
    if name == "fill":  # NaN where the configuration does not say
        room = [finite_number(run.settings.get(f"data.{key}")) or np.nan for key in ("token_budget", "bins_per_step")]
        return run.steps, run.metrics["tokens"] / np.prod(room)
    return run.steps, run.metrics[name]


def _charts(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> Iterator[Chart]:
    for panel in panels:
        curves = panel.curves.items()
        if len(runs) == 1:
            drawn = {panel.title: {label: _points(runs[0], name) for label, name in curves}}
        else:
            titles = {label: panel.title + f": {label}" * (len(curves) > 1) for label in panel.curves}
            drawn = {titles[label]: {run.name: _points(run, name) for run in runs} for label, name in curves}
        for title, each in drawn.items():
            if any(np.isfinite(y).any() for _, y in each.values()):
                yield Chart(title, panel.unit, _draw(panel, each, runs))


def _draw(panel: Panel, curves: dict[str, Points], runs: Sequence[RunRecord]) -> go.Figure:
    """Curves in a panel's axes; of many noisy points faint, with their moving mean."""
    traces, most = [], max(MAX_POINTS // len(runs) // 2 * 2, MIN_POINTS)
    for slot, (label, (x, y)) in enumerate(curves.items()):
        if not np.isfinite(y).any():
            continue
        look: dict[str, Any] = {"marker": {"maxdisplayed": MARKERS}} if len(x) >= MEAN_FROM else {}
        if len(x) >= MEAN_FROM and panel.is_noisy:
            faint = {"mode": "lines", "line": {"width": 1, "dash": "solid"}, "opacity": 0.3, "showlegend": False}
            traces.append(scatter(label, *thin(x, y, most), slot, **faint))
            y, look["hoverinfo"] = moving_mean(y, max(len(y) // 40, 5) | 1), "skip"
        traces.append(scatter(label, *thin(x, y, most), slot, **look))
    xaxis = {"title": {"text": "step", "standoff": 4}, "rangemode": "tozero"}
    found = figure(traces, xaxis, _yaxis(panel, [y for _, y in curves.values()]), showlegend=len(curves) > 1)
    run, best = runs[0], runs[0].best
    if len(runs) == 1 and panel.shows_epochs:
        ends = run.steps[:-1][np.diff(run.metrics["epoch"]) > 0]  # of all but the last
        for step in ends if len(ends) <= MAX_EPOCHS else ():
            found.add_vline(step, line={"dash": "dot", "width": 1, "color": COLORS[-1]})
    if len(runs) == 1 and best and run.best_by in panel.curves.values():
        label = f"best by {run.best_by.in_words}: step {best.step}"
        star = {"symbol": "star", "size": 15, "color": "#d29922", "line": {"width": 1, "color": COLORS[-1]}}
        found.add_trace(scatter(label, [best.step], [best.numbers[run.best_by]], 7, mode="markers", marker=star))
    return found


def _yaxis(panel: Panel, columns: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Ticks; logarithmic where a linear axis would flatten all but the largest values."""
    values = np.concatenate([y[np.isfinite(y)] for y in columns])
    if panel.may_be_log and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        return {"type": "log", "dtick": 1, "tickformat": "~g", "hoverformat": ".5g"}
    return {"hoverformat": ".5g"} | panel.yaxis


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
