"""One HTML file that needs nothing else: texts escaped by Jinja, charts drawn by Plotly's JavaScript, which is inside.

html = render(Contents(runs=named([Path("runs/a")])), reload_s=None)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ochat import __version__
from ochat.errors import ConfigError, DataError
from ochat.report import charts, samples, tables
from ochat.report.ablation import Ablation
from ochat.report.charts import Group
from ochat.report.run_record import RunRecord
from ochat.report.tables import Table

HERE = Path(__file__).parent
NAMED = 4  # runs that the title names


@dataclass(frozen=True)
class Contents:
    """What a page is about."""

    runs: Sequence[RunRecord]
    swaps: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> record, besides the runs' own
    ablation: Ablation | None = None


def render(contents: Contents, reload_s: float | None = None) -> str:
    """The page as it stands now. `reload_s`: it loads itself again after so many seconds, for as long as a run goes on.

    Raises: ConfigError where Plotly is missing; DataError for a swap matrix or an ablation that is none.
    """
    runs = contents.runs
    groups, notes = charts.groups(runs), [f"{run.name}: {note}" for run in runs for note in run.notes]
    ablation_charts, ablation_tables = contents.ablation.shown() if contents.ablation else ([], [])
    evidence = Group("Evidence", "", ablation_charts)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":"), "sort_keys": True}
    page = environment.get_template("page.html").render(
        version=__version__,
        title=", ".join(run.name for run in runs) if len(runs) <= NAMED else f"{len(runs)} runs",
        written=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        runs=runs,
        reload_s=reload_s,
        summary=tables.summary(runs),
        evaluations=list(filter(None, map(tables.evaluations, runs))),
        differences=tables.differences(runs),
        groups=groups,
        evidence=evidence,
        charts=_numbered([*groups, evidence]),
        tables=[*ablation_tables, *_swaps(contents, notes)],
        bad_steps=list(filter(None, map(tables.bad_steps, runs))),
        samples=[(run.name, asked) for run in runs if (asked := samples.of_run(run))],
        notes=notes,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(plotly_js()),
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # an answer may hold half of a surrogate pair


def plotly_js() -> str:
    """Plotly's minified JavaScript, 5 MB. Raises: ConfigError where the package is missing."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("ochat report needs the package plotly: pip install 'ochat[report]'") from None
    return get_plotlyjs()


def _numbered(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the page's script draws, in the order of the page's figures."""
    found = [chart for group in groups for chart in group.charts]
    return [{"traces": chart.traces, "layout": chart.layout, "title": chart.title} for chart in found]


def _swaps(contents: Contents, notes: list[str]) -> list[Table]:
    """Those asked for must be read; a run's own that cannot be is noted."""
    found = [tables.swap(record, name) for name, record in contents.swaps.items()]
    for run in contents.runs:
        try:
            found += [tables.swap(run.swap, run.name)] if run.swap else []
        except DataError as error:
            notes.append(str(error))
    return found
