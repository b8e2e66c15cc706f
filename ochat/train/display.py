"""What a run shows on the terminal: a summary before the first step, a live line while it trains, the results of
evaluations.

Only the first rank shows anything. On a terminal the progress bar stays at the bottom; elsewhere each flush prints
one line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ochat.console import facts

SAMPLE_CHARACTERS = 240


class Display:
    """The first rank's console; the other ranks' is silent."""

    def __init__(self, show: bool):
        self.show = show
        self.console = Console(quiet=not show, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = 0.0

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Facts as two aligned columns."""
        self.console.print(facts(title, rows))

    def note(self, text: str) -> None:
        """One plain line."""
        self.console.print(escape(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that must not be missed."""
        self.console.print(f"[bold red]WARNING[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def progress(self, done: int, total: int) -> Iterator[None]:
        """A live progress bar from step `done` to `total`, if this is a terminal."""
        if not self.console.is_terminal or not self.show:
            yield
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task("", total=total, completed=done)
            yield
        self._progress = None

    def steps(self, lines: list[dict[str, Any]], total: int) -> None:
        """Moves the bar, and prints the newest of the flushed steps as a line, at most one a second."""
        if not lines:
            return
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=lines[-1]["step"])
        if time.monotonic() - self._printed > 1 or lines[-1]["step"] == total:
            self._printed = time.monotonic()
            self.note(f"step {lines[-1]['step']}/{total}  {_describe(lines[-1])}")

    def evaluation(self, line: dict[str, Any]) -> None:
        """The held-out numbers of one evaluation, a row a class."""
        table = Table(title=f"held out, after step {line['step']}", title_justify="left")
        for heading in ("class", "loss", "accuracy", "tokens"):
            table.add_column(heading, justify="left" if heading == "class" else "right")
        whole = {"loss": line["loss"], "accuracy": line["accuracy"], "tokens": line["supervised_tokens"]}
        for name, row in [*line["classes"].items(), ("all, weighted", whole)]:
            table.add_row(escape(name), _number(row["loss"]), _number(row["accuracy"]), f"{row['tokens']:,}")
        self.console.print(table)

    def samples(self, answers: list[dict[str, str]]) -> None:
        """The answers to the fixed prompts, each on a line; samples.jsonl has them whole."""
        for a in answers:
            text = " / ".join(a["answer"].splitlines())
            shown = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " ..."
            line = f"[dim]{escape(a['condition'])}[/dim] {escape(a['prompt'])} [dim]->[/dim] {escape(shown)}"
            self.console.print(line, soft_wrap=True)


def _describe(line: dict[str, Any]) -> str:
    if line.get("skipped"):
        return "skipped, its loss or gradient is not finite"
    losses = "  ".join(f"{name} {_number(row['loss'])}" for name, row in line["classes"].items())
    return (
        f"loss {line['loss']:.4f} ({losses})  acc {line['accuracy']:.3f}  lr {line['lr']:.2e}  "
        f"|g| {line['grad_norm']:.2f}  {line['tokens_per_s']:,.0f} tok/s "
        f"({line['supervised_tokens_per_s']:,.0f} supervised)  mfu {line['mfu']:.1%}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
