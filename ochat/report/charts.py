"""Draw the charts of a report as plotly figures. One run: a chart shows its classes. Several: each chart compares them.

    for group in charts.groups(runs): group.title, group.charts[0].figure

Colours have a contrast of at least 3.8 to both a white and a dark page; the page's style sheet colours text and grid.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from ochat.checkpoint.best import ALL, loss_label
from ochat.report.run_record import RunRecord, class_label, class_names

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
SHARE = ".3~p"  # a tick format

Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # (n,) steps and values; NaN: no value
Read = Callable[[RunRecord], Points]


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    unit: str
    figure: go.Figure
    is_crowded: bool = False  # its legend takes several lines


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
    curves: dict[str, Read]
    ticks: str = ""  # a tick format of plotly
    may_be_log: bool = False
    is_from_zero: bool = False
    is_noisy: bool = True
    shows_epochs: bool = False


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Every chart that has something to show."""
    names, share, nats = class_names(runs), "share of tokens", "nats a token"

    def trained(key: str) -> dict[str, Read]:
        return {ALL: column(key)} | {class_label(name): column("classes", name, key) for name in names}

    def measured(what: str) -> dict[str, Read]:
        return {class_label(name): held_out(name, what) for name in (ALL, *names)}

    rates = {"real": "tokens_per_s", "supervised": "supervised_tokens_per_s", "padded": "padded_tokens_per_s"}
    work = "largest over mean work of a step's bins, first epoch"
    panels = {
        ("Training", DRAWN): [
            Panel("Loss", nats, trained("loss"), may_be_log=True, shows_epochs=True),
            Panel("Accuracy", share, trained("accuracy"), SHARE, shows_epochs=True),
        ],
        ("Held out", "Measured at every evaluation, on held-out conversations."): [
            Panel("Held-out loss", nats, measured("losses")),
            Panel("Held-out accuracy", share, measured("accuracies"), SHARE),
        ],
        ("Optimizer", ""): [
            Panel("Learning rate", "", {"lr": column("lr")}, ".1e", is_noisy=False),
            Panel("Gradient norm", "before clipping", {"gradient norm": column("grad_norm")}, may_be_log=True),
        ],
        ("Speed and memory", "Without the time spent in evaluations and checkpoints."): [
            Panel("Tokens a second", "all processes", {k: column(v) for k, v in rates.items()}, is_from_zero=True),
            Panel("MFU", "share of the peak", {"MFU": column("mfu")}, SHARE, is_from_zero=True),
            Panel("Peak memory", "GiB, rank 0", {"memory": column("peak_mem_gib")}, is_from_zero=True, is_noisy=False),
        ],
        ("Packing", ""): [
            Panel("Fill", "real tokens over room in the bins", {"fill": lambda run: (run.steps, run.fill)}, SHARE),
            Panel("Balance", work, {"balance": balance}, is_noisy=False),
        ],
    }
    found = [Group(title, note, [*_charts(runs, each)]) for (title, note), each in panels.items()]
    if len(runs) == 1 and runs[0].best and found[1].charts:
        _mark_best(found[1].charts[0].figure, runs[0])
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


def column(*name: str) -> Read:
    """A column of metrics.jsonl over its steps."""
    key = name[0] if len(name) == 1 else name
    return lambda run: (run.steps, run.metrics[key])


def held_out(name: str, what: str) -> Read:
    """A class's held-out `losses` or `accuracies` over the steps of the evaluations."""

    def read(run: RunRecord) -> Points:
        values = [getattr(each, what).get(name) for each in run.evaluations]
        return np.array([each.step for each in run.evaluations], float), np.array(values, float)

    return read


def balance(run: RunRecord) -> Points:
    """The planned imbalance of the first epoch: the worst step of every few."""
    planned = run.plan.get("imbalance")
    try:
        each, worst = int(planned["steps_each"]), np.array(planned["worst"], float).reshape(-1)  # type: ignore
        return each * np.arange(1, len(worst) + 1, dtype=float), worst
    except (LookupError, TypeError, ValueError, OverflowError):
        return np.zeros(0), np.zeros(0)


def _charts(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> Iterator[Chart]:
    most = max(MAX_POINTS // len(runs) // 2 * 2, MIN_POINTS)
    for panel in panels:
        if len(runs) == 1:
            drawn = {panel.title: {label: read(runs[0]) for label, read in panel.curves.items()}}
        else:
            single = len(panel.curves) == 1
            drawn = {panel.title if single else f"{panel.title}: {label}": {run.name: read(run) for run in runs}
                     for label, read in panel.curves.items()}  # fmt: skip
        for title, curves in drawn.items():
            if any(np.isfinite(y).any() for _, y in curves.values()):
                yield Chart(title, panel.unit, _draw(panel, curves, runs, most), is_crowded=len(curves) > 4)


def _draw(panel: Panel, curves: dict[str, Points], runs: Sequence[RunRecord], most: int) -> go.Figure:
    """Curves in a panel's axes; of many noisy points faint, with their moving mean."""
    traces = []
    for slot, (label, (x, y)) in enumerate(curves.items()):
        if not np.isfinite(y).any():
            continue
        is_long, xs_ys = len(x) >= MEAN_FROM, thin(x, y, most)
        marker = {"maxdisplayed": MARKERS} if is_long else {}
        if is_long and panel.is_noisy:
            faint = {"mode": "lines", "line": {"width": 1, "dash": "solid"}, "opacity": 0.3, "showlegend": False}
            traces.append(scatter(label, *xs_ys, slot, **faint))
            xs_ys = thin(x, moving_mean(y, max(len(y) // 40, 5) | 1), most)
            traces.append(scatter(label, *xs_ys, slot, marker=marker, hoverinfo="skip"))
        else:
            traces.append(scatter(label, *xs_ys, slot, marker=marker))
    xaxis = {"title": {"text": "step", "standoff": 4}, "rangemode": "tozero"}
    found = figure(traces, xaxis, _yaxis(panel, [y for _, y in curves.values()]), showlegend=len(curves) > 1)
    for step in epoch_ends(runs[0]) if panel.shows_epochs and len(runs) == 1 else ():
        found.add_vline(step, line={"dash": "dot", "width": 1, "color": COLORS[-1]})
    return found


def _yaxis(panel: Panel, columns: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Ticks; logarithmic where a linear axis would flatten all but the largest values."""
    values = np.concatenate([y[np.isfinite(y)] for y in columns])
    if panel.may_be_log and values.min() > 0 and values.max() > LOG_RATIO * values.min():
        return {"type": "log", "dtick": 1, "tickformat": "~g", "hoverformat": ".5g"}
    start = "tozero" if panel.is_from_zero else "normal"
    return {"tickformat": panel.ticks, "hoverformat": ".5g", "rangemode": start}


def epoch_ends(run: RunRecord) -> list[float]:
    """The last step of each epoch but the last; empty for a run of very many."""
    ends = run.steps[:-1][np.diff(run.metrics["epoch"]) > 0].tolist() if len(run.steps) else []
    return ends if len(ends) <= MAX_EPOCHS else []


def _mark_best(found: go.Figure, run: RunRecord) -> None:
    """Add a star at the best evaluation, on the curve of the class that it was chosen by."""
    assert run.best is not None
    label = f"best of {loss_label(run.best_by)}: step {run.best.step}"
    marker = {"symbol": "star", "size": 15, "color": "#d29922", "line": {"width": 1, "color": COLORS[-1]}}
    found.add_trace(scatter(label, [run.best.step], [run.best.losses[run.best_by]], 7, mode="markers", marker=marker))


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
