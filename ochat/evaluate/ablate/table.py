"""Tabulate how often and how likely each variant gives the expert's answers, under either class's prefix.

    record = summarise(results, "GPT4", "GPT3");  console.print(*tables(record));  markdown(record)

Each cell is a mean over seeds with a t interval, followed by the difference to C-RLFT, paired by seed. With one seed a
cell has the bootstrap interval over its held-out conversations, and the difference has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.evaluate import intervals
from ochat.evaluate.ablate.variants import OURS
from ochat.files import atomic

TABLE = "table.json"
SIDES = ("expert", "suboptimal")  # whose prefix
ABOVE = "above_ours"  # the difference to C-RLFT under the expert's prefix
Cell = dict[str, Any]  # mean, interval ([low, high] or None), values (one a seed)


class Measure(NamedTuple):
    """Of the expert's answers."""

    title: str
    short: str
    most: float  # its range is from 0 to it
    scale: float  # as it is shown
    form: str


MEASURES = {
    "exact": Measure("exact match of expert answers, %", "exact match, %", 1.0, 100, ".1f"),
    "nll": Measure("nll of expert answers, nats a token", "nll", math.inf, 1, ".3f"),
}


def summarise(results: Sequence[dict[str, Any]], expert: str, suboptimal: str) -> dict[str, Any]:
    """What table.json holds: classes, how intervals were made, and `rows`: variant, title, seeds, and for each of
    MEASURES a cell under each prefix (SIDES) and the difference to C-RLFT.

    A variant without a condition has one prefix, which counts as the expert's; its other cells are None, as are those
    of a measure or difference that has not been made.
    """
    names = {"expert": expert, "suboptimal": suboptimal}
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        measured = result["classes"][expert]["prefixes"]
        is_plain = result["conditions"] == [""]
        sides = {"expert": measured[""]} if is_plain else {side: measured[name] for side, name in names.items()}
        by_variant.setdefault(result["variant"], []).append(result | {"sides": sides})
    ours = {result["seed"]: result["sides"]["expert"] for result in by_variant.get(OURS, [])}
    conversations = [result["classes"][expert]["conversations"] for result in results]
    return {
        **names,
        "held_out_conversations": [min(conversations), max(conversations)],
        "interval": {"level": intervals.LEVEL, "method": "t over seeds", "of_one_seed": results[0]["interval"]},
        "rows": [_row(members, ours) for members in by_variant.values()],
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write table.json and table.md. Raises: OSError."""
    atomic.write_json(folder / TABLE, record)
    atomic.write_text(folder / "table.md", markdown(record))


def tables(record: dict[str, Any]) -> list[Table]:
    """One table a measure, a row a variant."""
    found = []
    for key, measure in MEASURES.items():
        shown = Table(title=escape(measure.title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        shown.add_column("variant", overflow="fold")
        for heading in _headings(record):
            shown.add_column(escape(heading), justify="right")
        for row in record["rows"]:
            shown.add_row(escape(row["title"]), *map(escape, _cells(row, key, "\n")))
        found.append(shown)
    found[-1].caption = escape(_caption(record))
    return found


def markdown(record: dict[str, Any]) -> str:
    """All of it as one table of Markdown, and what the intervals are."""
    heads = [f"{measure.short}: {heading}" for measure in MEASURES.values() for heading in _headings(record)]
    lines = [["variant", "seeds", *heads], ["---", *["---:"] * (1 + len(heads))]]
    for row in record["rows"]:
        cells = [cell for key in MEASURES for cell in _cells(row, key, " ")]
        lines.append([row["title"], str(len(row["seeds"])), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{_caption(record)}\n"


def _row(members: Sequence[dict[str, Any]], ours: dict[int, dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {key: members[0][key] for key in ("variant", "title")}
    row["seeds"] = [member["seed"] for member in members]
    pairs = [(member["sides"]["expert"], ours[member["seed"]]) for member in members if member["seed"] in ours]
    for key, measure in MEASURES.items():
        row[key] = {}
        for side in SIDES:
            found = [member["sides"][side] for member in members if side in member["sides"]]
            of_one = found[0][f"{key}_interval"] if found else None
            row[key][side] = _cell([each[key] for each in found], 0.0, measure.most, of_one)
        above = [] if row["variant"] == OURS else [its[key] - of_ours[key] for its, of_ours in pairs]
        row[key][ABOVE] = _cell(above, -measure.most, measure.most)
    return row


def _cell(values: Sequence[float], least: float, most: float, of_one: Sequence[float] | None = None) -> Cell | None:
    """The mean of some values, and its interval, cut to the range of the measure; `of_one`: that of a single value."""
    if not values:
        return None
    cell = intervals.mean_of(values)
    ends = cell["interval"] or of_one
    return cell | {"interval": ends and [min(max(end, least), most) for end in ends]}


def _headings(record: dict[str, Any]) -> list[str]:
    return [*(f"{record[side]} prefix" for side in SIDES), "less C-RLFT"]


def _cells(row: dict[str, Any], key: str, join: str) -> list[str]:
    """Means and intervals; a share in percent, a difference with its sign."""
    measure = MEASURES[key]
    found = []
    for column, sign in (*((side, "") for side in SIDES), (ABOVE, "+")):
        cell, form = row[key][column], sign + measure.form
        found.append(intervals.shown(cell["mean"], cell["interval"], form, measure.scale, join) if cell else "-")
    return found


def _caption(record: dict[str, Any]) -> str:
    """What was measured, and what the brackets hold."""
    low, high = record["held_out_conversations"]
    level, counts = f"{record['interval']['level']:.0%}", {len(row["seeds"]) for row in record["rows"]}
    methods = [f"t interval over seeds, {level}"] * (max(counts) > 1)
    methods += [f"of one seed {record['interval']['of_one_seed']['method']}, {level}"] * (1 in counts)
    return (
        f"Answers of {record['expert']} to {low if low == high else f'{low} to {high}'} held-out prompts. "
        f"[low, high]: {'; '.join(methods)}. Less C-RLFT: difference under the {record['expert']} prefix, paired by "
        "seed. A variant without condition has one prefix, which names no class."
    )
