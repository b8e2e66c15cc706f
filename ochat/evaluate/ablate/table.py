"""Tabulate how often and how likely each variant gives the expert's answers, under either class's prefix.

    record = summarise(results, "GPT4", "GPT3");  console.print(*tables(record));  markdown(record)

Each cell is a mean over seeds with a t interval, followed by the difference to C-RLFT, paired by seed. With one seed a
cell has the bootstrap interval over its held-out conversations, and the difference has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ochat.evaluate import intervals
from ochat.evaluate.ablate.variants import OURS
from ochat.files import atomic

MEASURES = {"exact": "exact match of expert answers, %", "nll": "nll of expert answers, nats a token"}
SIDES = ("expert", "suboptimal")  # whose prefix
ABOVE = "above_ours"  # the difference to C-RLFT under the expert's prefix
Cell = dict[str, Any]  # mean, interval ([low, high] or None), values (one a seed)


def summarise(results: Sequence[dict[str, Any]], expert: str, suboptimal: str) -> dict[str, Any]:
    """What table.json holds: classes, how intervals were made, and `rows`: variant, title, seeds, and for each of
    MEASURES a cell under each prefix (SIDES) and the difference to C-RLFT.

    A variant without a condition has one prefix, which counts as the expert's; its other cells are None, as are those
    of a measure or difference that has not been made.
    """
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_variant.setdefault(result["variant"], []).append(result)
    names = {"expert": expert, "suboptimal": suboptimal}
    ours = {result["seed"]: result for result in by_variant.get(OURS, [])}
    conversations = [result["classes"][expert]["conversations"] for result in results]
    return {
        "expert": expert,
        "suboptimal": suboptimal,
        "held_out_conversations": [min(conversations), max(conversations)],
        "interval": {"level": intervals.LEVEL, "method": "t over seeds", "of_one_seed": results[0]["interval"]},
        "rows": [_row(members, ours, names) for members in by_variant.values()],
    }


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write table.json and table.md. Raises: OSError."""
    atomic.write_json(folder / "table.json", record)
    atomic.write_text(folder / "table.md", markdown(record))


def tables(record: dict[str, Any]) -> list[Table]:
    """One table a measure, a row a variant."""
    return [_table(record, measure, title) for measure, title in MEASURES.items()]


def markdown(record: dict[str, Any]) -> str:
    """All of it as one table of Markdown, and what the intervals are."""
    heads = ["variant", "seeds"]
    for measure in ("exact match, %", "nll"):
        heads += [f"{measure}: {heading}" for heading in _headings(record)]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in record["rows"]:
        cells = [_shown(row[m][key], m, key, " ") for m in MEASURES for key in (*SIDES, ABOVE)]
        lines.append([row["title"], str(len(row["seeds"])), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption(record)}\n"


def caption(record: dict[str, Any]) -> str:
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


def _row(members: Sequence[dict[str, Any]], ours: dict[int, dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    first = members[0]
    row: dict[str, Any] = {
        "variant": first["variant"],
        "title": first["title"],
        "seeds": [member["seed"] for member in members],
    }
    for measure in MEASURES:
        cells = {side: _cell([_prefix(member, side, names) for member in members], measure) for side in SIDES}
        row[measure] = cells | {ABOVE: _difference(members, ours, measure, names)}
    return row


def _prefix(result: dict[str, Any], side: str, names: dict[str, str]) -> dict[str, Any] | None:
    """What was measured of expert answers under one side's prefix."""
    is_plain = result["conditions"] == [""]
    if is_plain and side != "expert":
        return None
    return result["classes"][names["expert"]]["prefixes"]["" if is_plain else names[side]]


def _cell(prefixes: Sequence[dict[str, Any] | None], measure: str) -> Cell | None:
    values = [prefix[measure] for prefix in prefixes if prefix is not None]
    if not values:
        return None
    cell = intervals.mean_of(values)
    if len(values) == 1:
        cell["interval"] = next(prefix[f"{measure}_interval"] for prefix in prefixes if prefix is not None)
    return _within(cell, 0.0, 1.0 if measure == "exact" else math.inf)


def _difference(
    members: Sequence[dict[str, Any]], ours: dict[int, dict[str, Any]], measure: str, names: dict[str, str]
) -> Cell | None:
    """To C-RLFT of the same seed; None for C-RLFT itself, and where it has none of these seeds."""
    pairs = [(member, ours[member["seed"]]) for member in members if member["seed"] in ours]
    if not pairs or members[0]["variant"] == OURS:
        return None
    values = []
    for pair in pairs:
        its, of_ours = (_prefix(result, "expert", names) for result in pair)
        assert its is not None and of_ours is not None, "every run is measured under the prefix it is served with"
        values.append(its[measure] - of_ours[measure])
    most = 1.0 if measure == "exact" else math.inf
    return _within(intervals.mean_of(values), -most, most)


def _within(cell: Cell, least: float, most: float) -> Cell:
    """The cell, its interval cut to the range of its measure."""
    ends = cell["interval"]
    return cell | {"interval": ends and [min(max(end, least), most) for end in ends]}


def _table(record: dict[str, Any], measure: str, title: str) -> Table:
    shown = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    if measure == list(MEASURES)[-1]:
        shown.caption = escape(caption(record))
    shown.add_column("variant", overflow="fold")
    for heading in _headings(record):
        shown.add_column(escape(heading), justify="right")
    for row in record["rows"]:
        shown.add_row(
            escape(row["title"]), *(escape(_shown(row[measure][key], measure, key, "\n")) for key in (*SIDES, ABOVE))
        )
    return shown


def _headings(record: dict[str, Any]) -> list[str]:
    return [f"{record['expert']} prefix", f"{record['suboptimal']} prefix", "less C-RLFT"]


def _shown(cell: Cell | None, measure: str, key: str, join: str) -> str:
    """A mean and its interval; a share in percent, a difference with its sign."""
    if cell is None:
        return "-"
    scale, digits = (100, 1) if measure == "exact" else (1, 3)
    sign = "+" if key == ABOVE else ""
    texts = [f"{scale * value:{sign}.{digits}f}" for value in (cell["mean"], *(cell["interval"] or ()))]
    return texts[0] + (f"{join}[{texts[1]}, {texts[2]}]" if cell["interval"] else "")
