"""Render a report as one HTML file that needs no network: page.html with the figures and plotly.js inside.

html = page.render(run_record.named([Path("runs/a")]), swaps={})
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from ochat import __version__
from ochat.errors import DataError
from ochat.report import ablation, charts, tables
from ochat.report.run_record import RunRecord

MAX_NAMED = 4  # runs that the title names


def render(
    runs: Sequence[RunRecord],
    swaps: dict[str, dict[str, Any]],
    ablated: dict[str, Any] | None = None,
    reload_s: float | None = None,
) -> str:
    """The page as of now. `swaps`: file -> swap matrix, in addition to the runs' own; `ablated`: what `ablation.read`
    returns. `reload_s`: the page reloads itself after so many seconds, while a run is live.

    Raises: DataError for a swap matrix or an ablation of another format.
    """
    groups, notes = charts.groups(runs), [f"{run.name}: {note}" for run in runs for note in run.notes]
    evidence, evidence_tables = ablation.shown(ablated) if ablated else ([], [])
    evidence_tables += [tables.swap(record, name) for name, record in swaps.items()]
    for run in runs:
        try:
            evidence_tables += [tables.swap(run.swap, run.name)] if run.swap else []
        except DataError as error:  # only what was asked for must be valid
            notes.append(str(error))
    shown = [chart for group in groups for chart in group.charts] + evidence
    figures = ",".join(str(chart.figure.to_json(engine="json")) for chart in shown)
    template = jinja2.Template(
        (Path(__file__).parent / "page.html").read_text(encoding="utf-8"),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = template.render(
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
        figures=Markup(f"[{figures}]"),  # plotly escapes < and > in its JSON
        tables=evidence_tables,
        nonfinite_steps=list(filter(None, map(tables.nonfinite_steps, runs))),
        samples=[(run.name, found) for run in runs if (found := tables.samples(run))],
        notes=notes,
        plotly=Markup(get_plotlyjs()),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # an answer may hold half of a surrogate pair
