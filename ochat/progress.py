"""Signs of life on a terminal, on stderr, gone when the work is done; nothing elsewhere.

with bar("conversations", 500) as advance: ...; advance(20)
with waiting("exporting"): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar of work that is counted; what it gives is told how many more are done."""
    with _shown(TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner and the time, for work that has no steps to count."""
    with _shown(SpinnerColumn(), TextColumn(what, markup=False), TimeElapsedColumn()) as progress:
        progress.add_task(what, total=None)
        yield


def _shown(*columns: ProgressColumn) -> Progress:
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
