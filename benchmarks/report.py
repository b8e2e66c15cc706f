"""Print an ops.csv as one table per operator, with the fastest attention of each case; or a train_step.csv.

python -m benchmarks.report DIR/ops.csv
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.csv_file import Row, read

PLAIN_WIDTH = 170  # of a table that goes into a file


def case_of(row: Row) -> str:
    """The name of a row's case within its operator."""
    is_head, is_attention = (row["operator"] == name for name in ("linear_cross_entropy", "attention"))
    parts = [row["model"], f"V={row['V']} {float(row['supervised']):.0%}" if is_head else ""]
    parts += [f"{row['N']}/{row['K']} heads of {row['D']}" if is_attention else "", row["variant"]]
    return " ".join(filter(None, [*parts, f"window {row['window']}" if row["window"] else ""]))


def write(rows: list[Row], file: TextIO = sys.stdout) -> None:
    """One table per operator, then what did not run and why, then the fastest attention."""
    console = Console(file=file, width=None if file.isatty() else PLAIN_WIDTH)
    if not rows:
        console.print("nothing was measured")
        return
    _print_stamp(console, rows[0], "device", "torch", "triton", "driver", "commit", "date")
    for name, unit in (("ceiling_tflop_per_s", "TFLOP/s"), ("ceiling_gb_per_s", "GB/s")):
        console.print(f"ceiling {unit}: {', '.join(sorted({row[name] for row in rows if row[name]}))}")
    for operator in dict.fromkeys(row["operator"] for row in rows):
        console.print(_table(operator, [row for row in rows if row["operator"] == operator and row["median_ms"]]))
    _print_unmeasured(console, [row for row in rows if row["note"]], "operator")
    for each in compare([row for row in rows if row["operator"] == "attention"]):
        ahead = f", {each.margin:.0%} ahead of {each.runner_up}" if each.runner_up else ""
        fastest = f"fastest: {each.fastest}, {each.times_baseline:.2f} x the baseline{ahead}"
        console.print(f'"auto" at {each.case}: {each.taken} ({fastest})', markup=False, highlight=False)


def _table(operator: str, rows: list[Row]) -> Table:
    """A line a measurement; `x ours` is its time over the baseline's (ours) in the same group."""
    numbers = ("ms", "p20-p80", "TFLOP/s", "GB/s", "of floor", "x ours", "peak GiB", "max error")
    table = _empty_table(operator, ("case", "pass", "implementation"), numbers)
    ours = {(row["group"], row["pass"]): float(row["median_ms"]) for row in rows if _is_baseline(row)}
    for row in rows:
        own, median_ms = ours.get((row["group"], row["pass"])), float(row["median_ms"])
        table.add_row(
            case_of(row), row["pass"],
            row["implementation"] + (" (unweighted)" if row["status"] == "unweighted" else ""),
            f"{median_ms:.3f}", f"{float(row['p20_ms']):.3f}-{float(row['p80_ms']):.3f}",
            f"{float(row['tflop_per_s']):.0f}" if row["tflop_per_s"] else "",
            f"{float(row['gb_per_s']):.0f}" if row["gb_per_s"] else "", f"{float(row['floor_fraction']):.1%}",
            f"{median_ms / own:.2f}" if own else "", f"{float(row['peak_gib']):.2f}" if row["peak_gib"] else "",
            f"{float(row['max_error']):.1e}",
        )  # fmt: skip
    return table


class Comparison(NamedTuple):
    """The backends of attention in one case, forward + backward."""

    case: str
    taken: str  # the baseline, unless another is faster by more than the spread
    fastest: str
    times_baseline: float  # the fastest's speed over the baseline's in the same group
    runner_up: str  # "" if no other was measured
    margin: float  # the fastest's speed over the runner-up's, less 1


def compare(rows: list[Row]) -> list[Comparison]:
    """One for each case in which the baseline has a time, in the order of the rows."""
    by_case = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and row["pass"] == "forward+backward":
            by_case[case_of(row)].append(row)
    return [_compare(case, of_case) for case, of_case in by_case.items() if any(map(_is_baseline, of_case))]


def _compare(case: str, rows: list[Row]) -> Comparison:
    """Times count as multiples of the baseline's in their group: the GPU is not equally warm in all of them."""
    baselines = {row["group"]: row for row in rows if _is_baseline(row)}
    speeds = [
        (float(baselines[row["group"]]["median_ms"]) / float(row["median_ms"]), row)
        for row in rows
        if row["group"] in baselines
    ]
    ranked = sorted(speeds, key=lambda pair: -pair[0])
    speed, fastest = ranked[0]
    baseline = baselines[fastest["group"]]
    taken = fastest if float(fastest["p80_ms"]) < float(baseline["p20_ms"]) else baseline
    others = [pair for pair in ranked if pair[1]["implementation"] != fastest["implementation"]]
    margin, runner_up = (speed / others[0][0] - 1, others[0][1]["implementation"]) if others else (0.0, "")
    return Comparison(case, taken["implementation"], fastest["implementation"], speed, runner_up, margin)


def _is_baseline(row: Row) -> bool:
    return row["implementation"] == row["baseline"]


def write_steps(rows: list[Row], file: TextIO = sys.stdout) -> None:
    """Who trains how fast, case by case; the reason where there is no number."""
    console = Console(file=file, width=PLAIN_WIDTH)
    _print_stamp(console, rows[0], "device", "cpu", "cores", "torch", "transformers", "driver", "commit", "date")
    names = ("model", "micro-batches", "options", "implementation")
    numbers = ("real tokens/s", "p20-p80", "supervised", "padded", "MFU", "peak GiB", "ours is x", "loss differs")
    table = _empty_table("whole steps", names, numbers)
    for row in (row for row in rows if row["tokens_per_s"]):
        table.add_row(
            row["model"], f"{row['bins_per_step']} x {row['token_budget']}", row["options"],
            row["implementation"] + ("" if row["status"] == "ok" else f" ({row['status']})"),
            f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['tokens_per_s_p20']):,.0f}-{float(row['tokens_per_s_p80']):,.0f}",
            f"{float(row['supervised_tokens_per_s']):,.0f}", f"{float(row['padded_tokens_per_s']):,.0f}",
            f"{float(row['mfu']):.1%}", f"{float(row['peak_gib']):.2f}",
            f"{float(row['ours_is_faster']):.2f}" if row["ours_is_faster"] else "",
            f"{float(row['loss_difference']):.1e}" if row["loss_difference"] else "",
        )  # fmt: skip
    console.print(table)
    _print_unmeasured(console, [row for row in rows if not row["tokens_per_s"]], "model")


def _print_stamp(console: Console, row: Row, *names: str) -> None:
    console.print(", ".join(f"{name} {row[name]}" for name in names if row[name]))


def _empty_table(title: str, names: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names + numbers:
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return table


def _print_unmeasured(console: Console, rows: list[Row], what: str) -> None:
    for subject, name, note in sorted({(row[what], row["implementation"], row["note"]) for row in rows}):
        console.print(f"not measured: {subject} {name}: {note}", markup=False)


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    (write if found and "operator" in found[0] else write_steps)(found)
