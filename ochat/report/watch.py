"""Follows live runs: the page is written again whenever a run's files have changed, until no run is live.

follow(runs, lambda is_live: write(...))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ochat.report.run_record import RunRecord

EVERY_S = 5.0  # between two looks at the folders, and between two loads of the page by itself


def follow(runs: Sequence[RunRecord], write: Callable[[bool], None], *, every_s: float = EVERY_S) -> None:
    """Calls `write(is_live)` now, after every change, and at the end, which may be Ctrl-C's, with False."""
    seen: object = None
    with suppress(KeyboardInterrupt):
        while True:
            stamps = [run.stamp() for run in runs]
            if stamps != seen:
                seen = stamps
                refresh(runs)
                if not any(run.is_live for run in runs):
                    break
                write(True)
            time.sleep(every_s)
    write(False)


def refresh(runs: Sequence[RunRecord]) -> None:
    """Reads what is new in every run."""
    for run in runs:
        run.refresh()
