"""Make the tables of a report: rows of plain text, which the page escapes.

tables.summary(runs);  tables.evaluations(run);  tables.differences(runs);  tables.swap(record, "runs/a");  samples(run)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from ochat.checkpoint.best import Evaluation, columns
from ochat.checkpoint.measure import ALL, Measure, class_label
from ochat.config import HELD_OUT
from ochat.errors import DataError
from ochat.files.jsonl import finite_number
from ochat.report.run_record import RunRecord, class_names

MAX_ROWS = 200  # of evaluations and of skipped steps
MAX_PLACES = 12  # of the conversations of a skipped step
MAX_PROMPTS, MAX_ANSWERS, MAX_CHARACTERS = 20, 8, 2000  # of samples
MEASURED = {
    "tokens/s, median": ("tokens_per_s", np.median, ",.0f"),
    "supervised tokens/s, median": ("supervised_tokens_per_s", np.median, ",.0f"),
    "MFU, median": ("mfu", np.median, ".1%"),
    "peak memory, GiB": ("peak_mem_gib", np.max, ".2f"),
    "tokens trained on": ("tokens", np.sum, ",.0f"),
}
SWAP_MEASURES = {"nll": "nll", "perplexity": "perplexity", "accuracy": "accuracy", "exact": "exact match"}


@dataclass(frozen=True)
class Table:
    """Headings over rows; the first `num_texts` columns are text, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    num_texts: int = 1
    marked: set[int] = field(default_factory=set)  # highlighted rows
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt: a row for each step that is shown, a column for each class."""

    prompt: str
    conditions: list[str]
    rows: list[tuple[int, list[str]]]
    num_steps: int  # at which it was answered


def summary(runs: Sequence[RunRecord]) -> Table:
    """What each run is and how it went: a fact a row, a run a column."""
    facts = [_facts(run) for run in runs]
    names = dict.fromkeys(name for each in facts for name in each)
    rows = [[name, *(each.get(name, "-") for each in facts)] for name in names]
    return Table("Summary", ["", *(run.name for run in runs)], rows, num_texts=1 + len(runs))


def evaluations(run: RunRecord) -> Table | None:
    """Every evaluation with its held-out numbers and its checkpoint, if that is there; the best one marked."""
    if not run.evaluations:
        return None
    classes = [*class_names([run]), None]  # of the first set, the expert first
    measured = columns(run.evaluations)
    measured.sort(key=lambda m: (0, classes.index(m.name)) if m.of == HELD_OUT else (1, 0))
    shown, num_all = run.evaluations, len(run.evaluations)
    if num_all > MAX_ROWS:
        kept = set(np.linspace(0, num_all - 1, MAX_ROWS - 1).astype(int).tolist())
        shown = [each for place, each in enumerate(shown) if place in kept or each is run.best]
    note = f"★ the best: {run.best_by.best_in_words}"
    note += f", {run.best_by.shown(run.best.numbers[run.best_by])}" if run.best else ""
    note += ". `ochat export RUN OUT --best` exports it while its checkpoint is there."
    note += f" {len(shown)} of {num_all:,} evaluations are shown; eval.jsonl has all." * (len(shown) < num_all)
    headings = ["", "step", "epochs"]
    headings += [_heading(measure, before) for measure, before in zip(measured, [None, *measured], strict=False)]
    rows = [_evaluation(run, each, measured) for each in shown]
    marked = {row for row, each in enumerate(shown) if each is run.best}
    return Table(f"Checkpoints of {run.name}", [*headings, "checkpoint"], rows, 1, marked, note)


def differences(runs: Sequence[RunRecord]) -> Table | None:
    """The settings that differ between runs."""
    if len(runs) < 2:
        return None
    settings = [{name: json.dumps(value, ensure_ascii=False, default=str) for name, value in run.settings.items()}
                for run in runs]  # fmt: skip
    names = sorted({name for each in settings for name in each} - {"run.dir"})
    written = {name: [each.get(name, "-") for each in settings] for name in names}
    rows = [[name, *values] for name, values in written.items() if len(set(values)) > 1]
    note = "" if rows else "None: the runs have the same settings."
    headings = ["setting", *(run.name for run in runs)]
    return Table("Differences of configuration", headings, rows, 1 + len(runs), note=note)


def nonfinite_steps(run: RunRecord) -> Table | None:
    """The steps that were skipped for a non-finite loss or gradient, and what they were computed on."""
    if not run.nonfinite_steps:
        return None
    rows = [
        [f"{int(line['step']):,}", *(str(line.get(key, "-"))[:40] for key in ("loss", "grad_norm")), _places(line)]
        for line in run.nonfinite_steps
    ]
    note = f"The first {MAX_ROWS} of {len(rows):,}; nonfinite_steps.jsonl has all." if len(rows) > MAX_ROWS else ""
    headings = ["step", "loss", "gradient norm", "computed on"]
    return Table(f"Skipped steps of {run.name}: not finite", headings, rows[:MAX_ROWS], 4, note=note)


def swap(record: dict[str, Any], where: str) -> Table:
    """The matrix that `ochat eval` wrote, and its verdict. Raises: DataError for something else."""
    try:
        classes = record["classes"]
        cells = [cell for row in classes.values() for cell in row["prefixes"].values()]
        measures = {key: title for key, title in SWAP_MEASURES.items() if any(key in cell for cell in cells)}
        rows, marked = [], set()
        for name, row in classes.items():
            best = min(row["prefixes"], key=lambda prefix: row["prefixes"][prefix]["nll"])
            for prefix, cell in row["prefixes"].items():
                marked |= {len(rows)} if prefix == best else set()
                whose = [class_label(name), class_label(prefix) + " ★" * (prefix == best)]
                rows.append(whose + [_measured(cell, key) for key in measures])
        headings = ["answers of", "under the prefix of", *measures.values()]
        verdict = f"{record['verdict']} " if isinstance(record.get("verdict"), str) else ""
        note = f"{verdict}Nats a token [interval]. ★ the likeliest prefix. "
        note += f"Model: {record['model']}. Data: {record['data']}."
        return Table(f"Held-out answers under each prefix, {where}", headings, rows, 2, marked, note)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{where}: not what `ochat eval --output FILE` writes ({error!r}); name such a file") from None


def samples(run: RunRecord) -> list[Sample]:
    """The first prompts of samples.jsonl, each answered at the first step, the last and some between."""
    asked: dict[str, dict[int, dict[str, str]]] = {}
    for line in run.samples:
        prompt, condition, answer = (str(line.get(key, "")) for key in ("prompt", "condition", "answer"))
        asked.setdefault(prompt, {}).setdefault(int(line["step"]), {})[condition] = answer
    found = []
    for prompt, steps in list(asked.items())[:MAX_PROMPTS]:
        conditions = list(dict.fromkeys(condition for answers in steps.values() for condition in answers))
        places = np.unique(np.linspace(0, len(steps) - 1, MAX_ANSWERS).round().astype(int))
        shown = [sorted(steps)[place] for place in places]
        rows = [(step, [_shorten(steps[step].get(condition, "")) for condition in conditions]) for step in shown]
        found.append(Sample(_shorten(prompt), list(map(class_label, conditions)), rows, len(steps)))
    return found


def _facts(run: RunRecord) -> dict[str, str]:
    """The rows of the summary, by name."""
    planned, last = f" of {run.num_planned:,}" if run.num_planned else "", itemgetter(-1)
    facts = {"state": run.state, "steps": f"{run.num_done:,}{planned}" + (f": {run.ending}" if run.ending else "")}
    announced = run.plan.get("facts")
    for name in ("model", "data", "classes", "computation", "attention", "processes", "packing"):
        if isinstance(announced, dict) and isinstance(announced.get(name), str):
            facts[name] = announced[name]
    names = {class_label(name): f"classes.{name}.loss" for name in class_names([run])}
    parts = ", ".join(f"{label} {_over(run, name, last, '.4f')}" for label, name in names.items())
    facts["final loss"] = _over(run, "loss", last, ".4f") + (f" ({parts})" if parts else "")
    if run.best:
        there = "there" if run.best.checkpoint else "not there"
        value = f"{run.best_by.shown(run.best.numbers[run.best_by])}, {run.best_by.in_words}"
        facts["held-out best"] = f"{value}, at step {run.best.step:,}; its checkpoint is {there}"
    for name, (key, reduce, form) in MEASURED.items():
        facts[name] = _over(run, key, reduce, form)
    seconds = int(np.nansum(run.metrics["step_s"]))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    facts["time in steps"] = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s"
    return facts | {"skipped steps": f"{len(run.nonfinite_steps):,}"}


def _over(run: RunRecord, key: str, reduce: Any, form: str) -> str:
    values = run.metrics[key]
    found = values[np.isfinite(values)]
    return format(float(reduce(found)), form) if len(found) else "-"


def _evaluation(run: RunRecord, each: Evaluation, measured: Sequence[Measure]) -> list[str]:
    cells = ["★ best" * (each is run.best), f"{each.step:,}", _number(run.epochs_at(each.step), ".4g")]
    cells += [measure.shown(each.numbers.get(measure)) for measure in measured]
    return [*cells, each.checkpoint.name if each.checkpoint else "-"]


def _heading(measure: Measure, before: Measure | None) -> str:
    """Of a column; it does not repeat the set and class of the column before."""
    if before and (before.of, before.name) == (measure.of, measure.name):
        return measure.kind
    name = ALL if measure.name is None else class_label(measure.name)
    return f"{name} {measure.kind}" if measure.of == HELD_OUT else f"{measure.of}: {name} {measure.kind}"


def _measured(cell: dict[str, Any], key: str) -> str:
    value, ends = finite_number(cell.get(key)), cell.get(f"{key}_interval")
    form = ".1%" if key in ("accuracy", "exact") else ".3f"
    return _number(value, form) + (f" [{ends[0]:{form}}, {ends[1]:{form}}]" if ends and value is not None else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _places(line: dict[str, Any]) -> str:
    """file:line of the first conversations of each bin."""
    bins = line.get("bins")
    places = [str(p) for each in bins if isinstance(each, list) for p in each] if isinstance(bins, list) else []
    more = f" and {len(places) - MAX_PLACES:,} more" if len(places) > MAX_PLACES else ""
    return ", ".join(places[:MAX_PLACES])[:MAX_CHARACTERS] + more


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
