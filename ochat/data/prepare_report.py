"""What a user sees of `ochat prepare`: a bar while it reads, counts by class, for the manifest and as a table.

print_report(prepare(...))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ochat.data.records import RecordFile

COLUMNS = {  # name in the counts -> heading
    "kept": "kept",
    "truncated": "truncated",
    "too_long": "too long",
    "unsupervised": "no answer",
    "tokens": "tokens",
    "supervised": "supervised",
}
Counts = dict[str, Counter[str]]  # class -> counts named as in COLUMNS
CAPTION = "dropped: too long, or no answer left within the context; supervised: tokens with a weight other than 0"


@dataclass(frozen=True)
class PrepareReport:
    """Counts of one run. Tokens are those that were kept."""

    output: str
    context: int
    classes: Counts
    rejected: int
    elapsed_s: float
    skipped: tuple[str, ...] = ()  # files of input folders that were not read
    held_out: PrepareReport | None = None  # of the held-out set

    @cached_property
    def total(self) -> Counter[str]:
        return sum(self.classes.values(), Counter())

    @property
    def kept(self) -> int:
        return self.total["kept"]

    @property
    def truncated(self) -> int:
        return self.total["truncated"]

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> conversations."""
        return {COLUMNS[name]: self.total[name] for name in ("too_long", "unsupervised")}

    @property
    def tokens(self) -> int:
        return self.total["tokens"]

    @property
    def supervised(self) -> int:
        return self.total["supervised"]

    def to_dict(self) -> dict[str, Any]:
        """Counts alone, without times and places: equal input gives an equal manifest."""
        classes = {name: {column: counts[column] for column in COLUMNS} for name, counts in self.classes.items()}
        return {column: self.total[column] for column in COLUMNS} | {"rejected": self.rejected, "classes": classes}

    def summary(self) -> str:
        """One line."""
        dropped = ", ".join(f"{count} dropped ({reason})" for reason, count in self.dropped.items() if count)
        cut = f"{self.truncated} of them truncated"
        return f"{self.kept} kept, {cut}, {dropped or 'none dropped'}, {self.rejected} rejected"


def add_counts(total: Counts, more: Mapping[str, Counter[str]]) -> None:
    """Adds `more` to `total`, class by class."""
    for name, count in more.items():
        total.setdefault(name, Counter()).update(count)


def print_report(report: PrepareReport, console: Console | None = None) -> None:
    """A table of classes for each data set, and one line about the whole."""
    console = console or Console()
    for each in filter(None, (report, report.held_out)):
        console.print(_table(each))
    if report.skipped:
        shown = ", ".join(map(escape, report.skipped[:5])) + (", ..." if len(report.skipped) > 5 else "")
        console.print(f"{len(report.skipped)} files with unknown endings were not read: {shown}", soft_wrap=True)
    rejects = f" ({escape(report.output)}/rejects.jsonl)" if report.rejected else ""
    console.print(f"{report.rejected} bad records rejected{rejects}; {report.elapsed_s:.1f} s", soft_wrap=True)


def _table(report: PrepareReport) -> Table:
    table = Table(
        title=f"{escape(report.output)}: conversations and tokens, context {report.context}",
        caption=CAPTION,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class", overflow="fold")
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, counts in sorted(report.classes.items()):
        table.add_row(escape(name) or "(none)", *(f"{counts[column]:,}" for column in COLUMNS))
    table.add_section()
    table.add_row("all", *(f"{report.total[column]:,}" for column in COLUMNS))
    return table


class Bar:
    """Progress by bytes read."""

    def __init__(self, files: Sequence[RecordFile], shown: bool) -> None:
        columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not shown)
        self.task = self.progress.add_task("prepare", total=sum(file.size for file in files))

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        return lambda position: self.progress.update(self.task, completed=position)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
