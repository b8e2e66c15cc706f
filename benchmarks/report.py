"""The rows of an ops.csv as tables for people, one per operator; those of a train_step.csv as one of whole steps.

python -m benchmarks.report DIR/ops.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.cases import OPERATORS

Row = dict[str, str]
PLAIN_WIDTH = 170  # of a table that goes into a file


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def case_of(row: Row) -> str:
    """Names the case of a row within its operator."""
    vocabulary = f" V={row['V']}" if row["operator"] == "linear_cross_entropy" else ""
    share = f" {float(row['supervised']):.0%}" if row["operator"] == "linear_cross_entropy" else ""
    return f"{row['model']}{vocabulary}{share}{' ' + row['variant'] if row['variant'] else ''}"


def write(rows: list[Row], console: Console) -> None:
    """One table per operator, then what did not run and why."""
    if not rows:
        console.print("nothing was measured")
        return
    stamp = [f"{name} {rows[0][name]}" for name in ("device", "torch", "triton", "driver", "commit", "date")]
    console.print(", ".join(line for line in stamp if not line.endswith(" ")))
    for name, unit in (("ceiling_tflop_per_s", "TFLOP/s"), ("ceiling_gb_per_s", "GB/s")):
        console.print(f"ceiling {unit}: {', '.join(sorted({row[name] for row in rows if row[name]}))}")
    for operator in OPERATORS:
        console.print(_table(operator, [row for row in rows if row["operator"] == operator and row["median_ms"]]))
    reasons = {(row["operator"], row["implementation"], row["note"]) for row in rows if row["note"]}
    for operator, implementation, note in sorted(reasons):
        console.print(f"not measured: {operator} {implementation}: {note}", markup=False)


def _table(operator: str, rows: list[Row]) -> Table:
    """A line a measurement; `x ours` is its time over ours in the same group."""
    table = Table(title=operator, title_justify="left")
    for name in ("case", "pass", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "p20-p80", "TFLOP/s", "GB/s", "of floor", "x ours", "peak GiB", "max error"):
        table.add_column(name, justify="right", no_wrap=True)
    ours = {(row["group"], row["pass"]): float(row["median_ms"]) for row in rows if row["implementation"] == "triton"}
    for row in rows:
        own = ours.get((row["group"], row["pass"]))
        median_ms = float(row["median_ms"])
        table.add_row(
            case_of(row),
            row["pass"],
            row["implementation"] + (" (unweighted)" if row["status"] == "unweighted" else ""),
            f"{median_ms:.3f}",
            f"{float(row['p20_ms']):.3f}-{float(row['p80_ms']):.3f}",
            f"{float(row['tflop_per_s']):.0f}" if row["tflop_per_s"] else "",
            f"{float(row['gb_per_s']):.0f}" if row["gb_per_s"] else "",
            f"{float(row['floor_fraction']):.1%}",
            f"{median_ms / own:.2f}" if own else "",
            f"{float(row['peak_gib']):.2f}" if row["peak_gib"] else "",
            f"{float(row['max_error']):.1e}",
        )
    return table


def write_steps(rows: list[Row], file: TextIO) -> None:
    """Who trains how fast, case by case; a line a row, the reason where there is no number."""
    console = Console(file=file, width=PLAIN_WIDTH)
    names = ("device", "cpu", "cores", "torch", "transformers", "driver", "commit", "date")
    console.print(", ".join(f"{name} {rows[0][name]}" for name in names if rows[0][name]))
    table = Table(title="whole steps", title_justify="left")
    for name in ("model", "micro-batches", "options", "implementation"):
        table.add_column(name, no_wrap=True)
    for name in ("real tokens/s", "p20-p80", "supervised", "padded", "MFU", "peak GiB", "ours is x", "loss differs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (row for row in rows if row["tokens_per_s"]):
        table.add_row(
            row["model"],
            f"{row['bins_per_step']} x {row['token_budget']}",
            row["options"],
            row["implementation"] + ("" if row["status"] == "ok" else f" ({row['status']})"),
            f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['tokens_per_s_p20']):,.0f}-{float(row['tokens_per_s_p80']):,.0f}",
            f"{float(row['supervised_tokens_per_s']):,.0f}",
            f"{float(row['padded_tokens_per_s']):,.0f}",
            f"{float(row['mfu']):.1%}",
            f"{float(row['peak_gib']):.2f}",
            f"{float(row['ours_is_faster']):.2f}" if row["ours_is_faster"] else "",
            f"{float(row['loss_difference']):.1e}" if row["loss_difference"] else "",
        )
    console.print(table)
    reasons = {(row["model"], row["implementation"], row["note"]) for row in rows if not row["tokens_per_s"]}
    for model, name, note in sorted(reasons):
        console.print(f"not measured: {model} {name}: {note}", markup=False)


def show(rows: list[Row]) -> None:
    """On the screen, or wide into a pipe."""
    write(rows, Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH))


def write_file(rows: list[Row], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        write(rows, Console(file=file, width=PLAIN_WIDTH))


if __name__ == "__main__":
    found = read(Path(sys.argv[1]))
    if "operator" in found[0]:
        show(found)
    else:
        write_steps(found, sys.stdout)
