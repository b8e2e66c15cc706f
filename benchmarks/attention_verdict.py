"""The rows of an attention.csv as a table, and who wins each length: what `attention = "auto"` would take on that card.

python -m benchmarks.attention_verdict DIR/attention.csv
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.report import PLAIN_WIDTH, Row, read


class Verdict(NamedTuple):
    """Of one case, forward + backward."""

    case: str
    taken: str  # the baseline, unless another is faster by more than the spread
    fastest: str
    times_baseline: float  # the fastest's speed over the baseline's in the same group
    runner_up: str  # "" if nobody else was measured
    margin: float  # the fastest's speed over the runner-up's, less 1


def verdicts(rows: list[Row]) -> list[Verdict]:
    """One a case in which the baseline has a time, in the order of the rows."""
    by_case = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row["pass"] == "forward+backward":
            by_case[case_of(row)].append(row)
    return [_verdict(case, of_case) for case, of_case in by_case.items() if any(map(_is_baseline, of_case))]


def _verdict(case: str, rows: list[Row]) -> Verdict:
    """Times count as multiples of the baseline's in their group: the card is not equally warm in all of them."""
    baselines = {row["group"]: row for row in rows if _is_baseline(row)}
    beside = [(row, baselines[row["group"]]) for row in rows if row["group"] in baselines]
    ranked = sorted(beside, key=lambda pair: float(pair[0]["median_ms"]) / float(pair[1]["median_ms"]))
    others = [pair for pair in ranked if pair[0]["implementation"] != ranked[0][0]["implementation"]]
    fastest, baseline = ranked[0]
    speed = float(baseline["median_ms"]) / float(fastest["median_ms"])
    is_clear = float(fastest["p80_ms"]) < float(baseline["p20_ms"])
    taken = fastest["implementation"] if is_clear else baseline["implementation"]
    second, its_baseline = others[0] if others else (None, None)
    second_speed = float(its_baseline["median_ms"]) / float(second["median_ms"]) if second and its_baseline else speed
    name = second["implementation"] if second else ""
    return Verdict(case, taken, fastest["implementation"], speed, name, speed / second_speed - 1)


def _is_baseline(row: Row) -> bool:
    return row["implementation"] == row["baseline"]


def case_of(row: Row) -> str:
    window = f", window {row['window']}" if row["window"] else ""
    return f"{row['model']} ({row['N']}/{row['K']} heads of {row['D']}), {row['lengths']}{window}"


def show(path: Path) -> None:
    """On the screen: every time, then what did not run and why, then the verdicts."""
    rows, console = read(path), Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    console.print(_table([row for row in rows if row["median_ms"]]))
    for name, note in sorted({(row["implementation"], row["note"]) for row in rows if row["note"]}):
        console.print(f"not measured: {name}: {note}", markup=False)
    for each in verdicts(rows):
        ahead = f", {each.margin:.0%} ahead of {each.runner_up}" if each.runner_up else ""
        fastest = f"fastest: {each.fastest}, {each.times_baseline:.2f} x the baseline{ahead}"
        console.print(f'"auto" at {each.case}: {each.taken} ({fastest})', markup=False, highlight=False)


def _table(rows: list[Row]) -> Table:
    table = Table(title="attention", title_justify="left")
    for name in ("case", "pass", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "p20-p80", "TFLOP/s", "of floor", "peak GiB", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            case_of(row),
            row["pass"],
            row["implementation"],
            f"{float(row['median_ms']):.3f}",
            f"{float(row['p20_ms']):.3f}-{float(row['p80_ms']):.3f}",
            f"{float(row['tflop_per_s']):.1f}",
            f"{float(row['floor_fraction']):.1%}",
            f"{float(row['peak_gib']):.2f}" if row["peak_gib"] else "",
            f"{float(row['max_error']):.1e}",
        )
    return table


if __name__ == "__main__":
    show(Path(sys.argv[1]))
