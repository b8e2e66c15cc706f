"""Checkpoint folders that appear and vanish whole, whatever moment the machine stops at.

    replace(Path("checkpoints/.step_5.tmp"), Path("checkpoints/step_5"));  remove(Path("checkpoints/step_5"))
What is half written or half removed has a name that starts with a dot, and goes with the next start's `sweep`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ochat.files import atomic


def replace(temporary: Path, final: Path) -> None:
    """Renames a finished folder, whose files are synced, onto a place where a damaged one may stand."""
    if final.exists():
        remove(final)
    atomic.replace(temporary, final)


def remove(folder: Path) -> None:
    """Removes a checkpoint so that a kill on the way leaves none that looks damaged."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what a killed run left half written or half removed."""
    for left in [*root.glob(".step_*.tmp"), *root.glob(".step_*.old")]:
        shutil.rmtree(left, ignore_errors=True)
