"""Render a report as one HTML file that needs no network: page.html with the figures and plotly.js inside.

html = page.render(Contents(runs=run_record.named([Path("runs/a")])))
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ochat import __version__
from ochat.errors import DataError
from ochat.report import ablation, charts, tables
from ochat.report.charts import Group
from ochat.report.run_record import RunRecord
from ochat.report.tables import Table

MAX_NAMED = 4  # runs that the title names


@dataclass(frozen=True)
class Contents:
    """What a page is about."""

    runs: Sequence[RunRecord]
    swaps: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> swap matrix, in addition to the runs' own
    ablation: dict[str, Any] | None = None


def render(contents: Contents, reload_s: float | None = None) -> str:
    """The page as of now. `reload_s`: the page reloads itself after so many seconds, while a run is live.

    Raises: DataError for a swap matrix or an ablation of another format.
    """
    runs = contents.runs
    groups, notes = charts.groups(runs), [f"{run.name}: {note}" for run in runs for note in run.notes]
    ablation_charts, ablation_tables = ablation.shown(contents.ablation) if contents.ablation else ([], [])
    evidence = Group("Evidence", "", ablation_charts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    figures = [str(chart.figure.to_json(engine="json")) for group in (*groups, evidence) for chart in group.charts]
    page = environment.get_template("page.html").render(
        version=__version__,
        title=", ".join(run.name for run in runs) if len(runs) <= MAX_NAMED else f"{len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        runs=runs,
        reload_s=reload_s,
        summary=tables.summary(runs),
        evaluations=list(filter(None, map(tables.evaluations, runs))),
        differences=tables.differences(runs),
        groups=groups,
        evidence=evidence,
        figures=Markup(f"[{','.join(figures)}]"),  # plotly escapes < and > in its JSON
        tables=[*ablation_tables, *_swaps(contents, notes)],
        nonfinite_steps=list(filter(None, map(tables.nonfinite_steps, runs))),
        samples=[(run.name, found) for run in runs if (found := tables.samples(run))],
        notes=notes,
        plotly=Markup(get_plotlyjs()),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # an answer may hold half of a surrogate pair


def _swaps(contents: Contents, notes: list[str]) -> list[Table]:
    """Those asked for must be valid; a run's own that is not becomes a note."""
    found = [tables.swap(record, name) for name, record in contents.swaps.items()]
    for run in contents.runs:
        try:
            found += [tables.swap(run.swap, run.name)] if run.swap else []
        except DataError as error:
            notes.append(str(error))
    return found
