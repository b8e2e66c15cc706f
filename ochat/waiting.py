"""A sign of life for work that has no steps to count: with waiting("exporting"): ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner and the time on a terminal, on stderr, gone when the work is done; nothing elsewhere."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn(what, markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield
