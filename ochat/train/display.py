"""Show a run on the terminal: its facts, its steps, and the results of evaluations, on the first rank only.

A progress bar stays at the bottom of a terminal; each flush of the metrics logs one line, at most one a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.markup import escape
from rich.table import Table

from ochat import console

log = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 240


class StepDisplay:
    """The progress of a run of `num_steps` steps."""

    def __init__(self, num_steps: int):
        self.num_steps, self._shown, self._printed = num_steps, 0, 0.0
        self._advance: Callable[[int], object] = lambda count: None

    @contextmanager
    def bar(self, done: int) -> Iterator[None]:
        """A progress bar from step `done`, on a terminal."""
        self._shown = done
        with console.bar("step", self.num_steps, done) as self._advance:
            yield

    def steps(self, lines: list[dict[str, Any]]) -> None:
        """Move the bar, and log the newest of the flushed steps, at most one a second."""
        if not lines:
            return
        newest = lines[-1]["step"]
        self._advance(newest - self._shown)
        self._shown = newest
        if time.monotonic() - self._printed > 1 or newest == self.num_steps:
            self._printed = time.monotonic()
            log.info(f"step {newest}/{self.num_steps}  {_describe(lines[-1])}")


def show_facts(title: str, facts: dict[str, str]) -> None:
    """Names and texts as two aligned columns."""
    console.show(console.facts(title, facts))


def show_evaluation(line: dict[str, Any]) -> None:
    """The held-out numbers of one evaluation, a row a class."""
    table = Table(title=f"held out, after step {line['step']}", title_justify="left")
    for heading in ("class", "loss", "accuracy", "tokens"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    whole = {"loss": line["loss"], "accuracy": line["accuracy"], "tokens": line["supervised_tokens"]}
    for name, row in [*line["classes"].items(), ("all, weighted", whole)]:
        table.add_row(escape(name), _number(row["loss"]), _number(row["accuracy"]), f"{row['tokens']:,}")
    console.show(table)


def show_samples(answers: list[dict[str, str]]) -> None:
    """The answers to the sample prompts, each cut to one line; samples.jsonl holds all of them."""
    for a in answers:
        text = " / ".join(a["answer"].splitlines())
        shown = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " ..."
        console.show(f"[dim]{escape(a['condition'])}[/dim] {escape(a['prompt'])} [dim]->[/dim] {escape(shown)}")


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
