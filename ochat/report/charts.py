"""The charts of a page, as Plotly reads them: of one run its classes, of several runs each curve beside the others'.

for group in charts.groups(runs): group.title, group.charts[0].traces
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.report.curves import Trace, traces
from ochat.report.run_record import RunRecord, class_names
from ochat.train import evaluations
from ochat.train.evaluations import ALL

POINTS = 1600  # of a curve; several runs share them, so that a page stays below some 3 MB beside Plotly's 5
LEAST_POINTS = 200
MOST_EPOCHS = 20  # whose ends are drawn; of more they would hide the curves
LEGEND_LINE = 4  # names that fit one
LOG_FROM = 50.0  # largest over smallest, from which an axis is logarithmic
DRAWN = (
    "Weighted as it is trained. Faint: each step, of very many the lowest and the highest of each stretch. Bold: their "
    "mean over a fortieth of the run. Dotted uprights: ends of epochs. Drag to zoom, click twice to go back."
)
NUMBER, SHARE, EXPONENT = "", ".3~p", ".1e"  # how an axis writes its ticks

Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # (n,) steps and values
Read = Callable[[RunRecord], Points]


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    unit: str
    traces: list[Trace]
    layout: dict[str, Any]

    @property
    def is_crowded(self) -> bool:
        """Its legend takes several lines."""
        return sum(trace.get("showlegend", True) for trace in self.traces) > LEGEND_LINE


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    note: str
    charts: list[Chart]


@dataclass(frozen=True)
class Panel:
    """What is drawn in one pair of axes for one run, and in a pair each where several are compared."""

    title: str
    unit: str
    curves: dict[str, Read]
    ticks: str = NUMBER
    may_be_log: bool = False
    is_from_zero: bool = False
    is_noisy: bool = True
    shows_epochs: bool = False


def groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Every chart that has something to show."""
    found = [
        Group("Training", DRAWN, _training(runs)),
        Group("Held out", "Measured at every evaluation, on conversations that are not trained on.", _held_out(runs)),
        Group("Optimizer", "", [*_charts(runs, OPTIMIZER)]),
        Group("Speed and memory", "Time spent in evaluations and checkpoints is left out.", [*_charts(runs, SPEED)]),
        Group("Packing", "", [*_charts(runs, PACKING)]),
    ]
    return [group for group in found if group.charts]


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
    """The worst step of each few steps of the first epoch, as planned."""
    planned = run.plan.get("imbalance")
    try:
        each, worst = int(planned["steps_each"]), np.array(planned["worst"], float).reshape(-1)  # type: ignore
        return each * np.arange(1, len(worst) + 1, dtype=float), worst
    except (LookupError, TypeError, ValueError, OverflowError):
        return np.zeros(0), np.zeros(0)


OPTIMIZER = (
    Panel("Learning rate", "", {"lr": column("lr")}, EXPONENT, is_noisy=False),
    Panel("Gradient norm", "before clipping", {"gradient norm": column("grad_norm")}, may_be_log=True),
)
SPEED = (
    Panel(
        "Tokens a second",
        "all processes together",
        {
            "real": column("tokens_per_s"),
            "supervised": column("supervised_tokens_per_s"),
            "padded": column("padded_tokens_per_s"),
        },
        is_from_zero=True,
    ),
    Panel("MFU", "share of the peak", {"MFU": column("mfu")}, SHARE, is_from_zero=True),
    Panel(
        "Peak memory",
        "GiB, of the first process",
        {"memory": column("peak_mem_gib")},
        is_from_zero=True,
        is_noisy=False,
    ),
)
PACKING = (
    Panel("Fill", "real tokens over room in the bins", {"fill": lambda run: (run.steps, run.fill)}, SHARE),
    Panel("Balance", "largest over mean work of a step's bins, first epoch", {"balance": balance}, is_noisy=False),
)


def _training(runs: Sequence[RunRecord]) -> list[Chart]:
    panels, names = [], class_names(runs)
    for key, title, unit, ticks in (
        ("loss", "Loss", "nats a token", NUMBER),
        ("accuracy", "Accuracy", "share of tokens", SHARE),
    ):
        curves = {ALL: column(key)} | {_label(name): column("classes", name, key) for name in names}
        panels.append(Panel(title, unit, curves, ticks, key == "loss", shows_epochs=True))
    return [*_charts(runs, panels)]


def _held_out(runs: Sequence[RunRecord]) -> list[Chart]:
    names = [ALL, *class_names(runs)]
    panels = [
        Panel("Held-out loss", "nats a token", {_label(name): held_out(name, "losses") for name in names}),
        Panel(
            "Held-out accuracy",
            "share of tokens",
            {_label(name): held_out(name, "accuracies") for name in names},
            SHARE,
        ),
    ]
    charts = [*_charts(runs, panels)]
    if len(runs) == 1 and charts and runs[0].best:
        charts[0].traces.append(_star(runs[0]))
    return charts


def _charts(runs: Sequence[RunRecord], panels: Sequence[Panel]) -> Iterator[Chart]:
    most = max(POINTS // len(runs) // 2 * 2, LEAST_POINTS)
    for panel in panels:
        if len(runs) == 1:
            curves = {label: read(runs[0]) for label, read in panel.curves.items()}
            drawn = [_chart(panel, panel.title, curves, runs, most)]
        else:
            drawn = []
            for label, read in panel.curves.items():
                title = f"{panel.title}: {label}" if len(panel.curves) > 1 else panel.title
                drawn.append(_chart(panel, title, {run.name: read(run) for run in runs}, runs, most))
        yield from (chart for chart in drawn if chart.traces)


def _chart(panel: Panel, title: str, curves: dict[str, Points], runs: Sequence[RunRecord], most: int) -> Chart:
    drawn = []
    for slot, (label, (x, y)) in enumerate(curves.items()):
        if np.isfinite(y).any():
            drawn += traces(label, x, y, slot=slot, most=most, is_noisy=panel.is_noisy)
    layout: dict[str, Any] = {"yaxis": _axis(panel, [y for _, y in curves.values()]), "showlegend": len(curves) > 1}
    if panel.shows_epochs and len(runs) == 1:
        layout["shapes"] = [_upright(step) for step in epoch_ends(runs[0])]
    return Chart(title, panel.unit, drawn, layout)


def _axis(panel: Panel, columns: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """Ticks, and a logarithmic axis where linear would flatten all but the largest values."""
    axis: dict[str, Any] = {"tickformat": panel.ticks} if panel.ticks else {}
    axis |= {"rangemode": "tozero"} if panel.is_from_zero else {}
    values = np.concatenate([np.zeros(0), *(y[np.isfinite(y)] for y in columns)])
    is_wide = len(values) > 0 and values.min() > 0 and values.max() > LOG_FROM * values.min()
    return axis | ({"type": "log", "dtick": 1, "tickformat": "~g"} if panel.may_be_log and is_wide else {})


def epoch_ends(run: RunRecord) -> list[float]:
    """The last step of each epoch but the last; none of a run of very many."""
    epochs, steps = run.metrics["epoch"], run.steps
    ends = steps[:-1][np.diff(epochs) > 0].tolist() if len(steps) else []
    return ends if len(ends) <= MOST_EPOCHS else []


def _upright(step: float) -> dict[str, Any]:
    return {
        "type": "line",
        "x0": step,
        "x1": step,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"dash": "dot", "width": 1},
    }


def _star(run: RunRecord) -> Trace:
    """The best evaluation, on the curve that it was chosen by."""
    assert run.best is not None
    loss = run.best.losses[run.best_by]
    assert loss is not None and math.isfinite(loss)
    return {
        "type": "scatter",
        "x": [run.best.step],
        "y": [loss],
        "name": html.escape(f"best of {evaluations.label(run.best_by)}: step {run.best.step}", quote=False),
        "mode": "markers",
        "marker": {"symbol": "star-open", "size": 16, "line": {"width": 2}},
        "meta": {"slot": -1},
    }


def _label(name: str) -> str:
    return name or "(no class)"
