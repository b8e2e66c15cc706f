"""The tables of a page: plain rows of text, which the page escapes.

tables.evaluations(run);  tables.differences(runs);  tables.swap(record)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ochat.errors import DataError
from ochat.report.run_record import RunRecord, class_names
from ochat.train.evaluations import ALL, Evaluation, label
from ochat.train.line_file import number

MOST_ROWS = 200  # of evaluations and of bad steps
MOST_PLACES = 12  # of the conversations of a bad step
MEASURED = {
    "tokens/s, median": ("tokens_per_s", np.median, ",.0f"),
    "supervised tokens/s, median": ("supervised_tokens_per_s", np.median, ",.0f"),
    "MFU, median": ("mfu", np.median, ".1%"),
    "peak memory, GiB": ("peak_mem_gib", np.max, ".2f"),
    "tokens trained on": ("tokens", np.sum, ",.0f"),
}
PER_RUN = ("run.dir",)  # settings that always differ
SWAP_MEASURES = {"nll": "nll", "perplexity": "perplexity", "accuracy": "accuracy", "exact": "exact match"}


@dataclass(frozen=True)
class Table:
    """Headings over rows; the first `num_texts` columns are text, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    num_texts: int = 1
    marked: set[int] = field(default_factory=set)  # rows that stand out
    note: str = ""


def summary(runs: Sequence[RunRecord]) -> Table:
    """What a run is and how it went: a fact a row, a run a column."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    rows = [[name, *(each.get(name, "-") for each in facts)] for name in names]
    return Table("Summary", ["", *(run.name for run in runs)], rows, num_texts=1 + len(runs))


def evaluations(run: RunRecord) -> Table | None:
    """Every evaluation with its held-out numbers, whether its checkpoint is there, and the best one marked."""
    if not run.evaluations:
        return None
    measured = {name for each in run.evaluations for name in each.losses}
    names = [name for name in (*class_names([run]), ALL) if name in measured]
    shown = _some(run.evaluations, run.best)
    rows = [_evaluation(run, each, names) for each in shown]
    headings = ["step", "epochs"]
    headings += [text for name in names for text in (f"{name or '(no class)'} loss", "accuracy")]
    note = f"★ the best: the lowest held-out loss of {label(run.best_by)}"
    note += f", {run.best.losses[run.best_by]:.4f}" if run.best else ""
    note += ". `ochat export RUN OUT --best` exports it while its checkpoint is there."
    if len(shown) < len(run.evaluations):
        note += f" {len(shown)} of {len(run.evaluations):,} evaluations are shown; eval.jsonl has all."
    marked = {row for row, each in enumerate(shown) if each is run.best}
    return Table(f"Checkpoints of {run.name}", ["", *headings, "checkpoint"], rows, 1, marked, note)


def differences(runs: Sequence[RunRecord]) -> Table | None:
    """The settings that are not the same in all runs."""
    if len(runs) < 2:
        return None
    names = sorted({name for run in runs for name in run.settings} - set(PER_RUN))
    written = {name: [_setting(run, name) for run in runs] for name in names}
    rows = [[name, *values] for name, values in written.items() if len(set(values)) > 1]
    note = "" if rows else "None: the runs have the same settings."
    headings = ["setting", *(run.name for run in runs)]
    return Table("Differences of configuration", headings, rows, 1 + len(runs), note=note)


def bad_steps(run: RunRecord) -> Table | None:
    """The steps that were not applied, and what they were computed on."""
    if not run.bad_steps:
        return None
    rows = [
        [f"{int(line['step']):,}", _text(line, "loss"), _text(line, "grad_norm"), _places(line)]
        for line in run.bad_steps
    ]
    note = f"The first {MOST_ROWS} of {len(rows):,}; bad_steps.jsonl has all." if len(rows) > MOST_ROWS else ""
    headings = ["step", "loss", "gradient norm", "computed on"]
    return Table(f"Bad steps of {run.name}: not applied", headings, rows[:MOST_ROWS], 4, note=note)


def swap(record: dict[str, Any], where: str) -> Table:
    """The matrix that `ochat eval --output` wrote. Raises: DataError for something else."""
    try:
        classes = record["classes"]
        cells = [cell for row in classes.values() for cell in row["prefixes"].values()]
        measures = {key: title for key, title in SWAP_MEASURES.items() if any(key in cell for cell in cells)}
        rows, marked = [], set()
        for name, row in classes.items():
            best = min(row["prefixes"], key=lambda prefix: row["prefixes"][prefix]["nll"])
            for prefix, cell in row["prefixes"].items():
                marked |= {len(rows)} if prefix == best else set()
                star = " ★" if prefix == best else ""
                whose = [name or "(no class)", (prefix or "(no class)") + star]
                rows.append(whose + [_measured(cell, key) for key in measures])
        headings = ["answers of", "under the prefix of", *measures.values()]
        note = (
            f"Nats a token, with intervals. ★ the likeliest prefix. Model: {record['model']}. Data: {record['data']}."
        )
        return Table(f"Held-out answers under each prefix, {where}", headings, rows, 2, marked, note)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where}: not what `ochat eval --output FILE` writes ({error!r}); name such a file") from None


def _facts(run: RunRecord) -> dict[str, str]:
    """The rows of the summary, by name."""
    planned = f" of {run.num_planned:,}" if run.num_planned else ""
    facts = {"state": run.state, "steps": f"{run.num_done:,}{planned}"}
    announced = run.plan.get("facts")
    for name in ("model", "data", "classes", "computation", "processes", "packing"):
        if isinstance(announced, dict) and isinstance(announced.get(name), str):
            facts[name] = announced[name]
    classes = ", ".join(
        f"{name or '(no class)'} {_last(run, ('classes', name, 'loss'))}" for name in class_names([run])
    )
    facts["final loss"] = _last(run, "loss") + (f" ({classes})" if classes else "")
    if run.best:
        facts["held-out best"] = (
            f"{run.best.losses[run.best_by]:.4f} of {label(run.best_by)}, at step {run.best.step:,}; its "
            f"checkpoint is {'there' if run.best.checkpoint else 'not there'}"
        )
    for name, (key, reduce, form) in MEASURED.items():
        facts[name] = _over(run, key, reduce, form)
    return facts | {"time in steps": _duration(run), "bad steps": f"{len(run.bad_steps):,}"}


def _last(run: RunRecord, key: Any) -> str:
    values = run.metrics[key]
    found = values[np.isfinite(values)]
    return f"{found[-1]:.4f}" if len(found) else "-"


def _over(run: RunRecord, key: str, reduce: Any, form: str) -> str:
    values = run.metrics[key]
    found = values[np.isfinite(values)]
    return format(float(reduce(found)), form) if len(found) else "-"


def _duration(run: RunRecord) -> str:
    values = run.metrics["step_s"]
    seconds = int(values[np.isfinite(values)].sum())
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s"


def _some(found: list[Evaluation], best: Evaluation | None) -> list[Evaluation]:
    """At most MOST_ROWS, evenly chosen, the first, the last and the best among them."""
    if len(found) <= MOST_ROWS:
        return found
    kept = set(np.linspace(0, len(found) - 1, MOST_ROWS - 1).astype(int).tolist())
    return [each for place, each in enumerate(found) if place in kept or each is best]


def _evaluation(run: RunRecord, each: Evaluation, names: Sequence[str]) -> list[str]:
    numbers = [
        text
        for name in names
        for text in (_number(each.losses.get(name), ".4f"), _number(each.accuracies.get(name), ".1%"))
    ]
    places = [f"{each.step:,}", _number(run.epochs_at(each.step), ".4g")]
    return ["★ best" * (each is run.best), *places, *numbers, each.checkpoint.name if each.checkpoint else "-"]


def _measured(cell: dict[str, Any], key: str) -> str:
    value, ends = number(cell.get(key)), cell.get(f"{key}_interval")
    form = ".1%" if key in ("accuracy", "exact") else ".3f"
    if value is None:
        return "-"
    return format(value, form) + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _setting(run: RunRecord, name: str) -> str:
    settings = run.settings
    return json.dumps(settings[name], ensure_ascii=False, default=str) if name in settings else "-"


def _text(line: dict[str, Any], key: str) -> str:
    return str(line.get(key, "-"))[:40]


def _places(line: dict[str, Any]) -> str:
    """file:line of the first conversations of each bin."""
    bins = line.get("bins")
    lists = [each for each in bins if isinstance(each, list)] if isinstance(bins, list) else []
    places = [str(place) for each in lists for place in each]
    more = f" and {len(places) - MOST_PLACES:,} more" if len(places) > MOST_PLACES else ""
    return ", ".join(places[:MOST_PLACES])[:2000] + more
