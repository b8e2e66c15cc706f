"""Checkpoint folders that appear and vanish whole, whatever moment the machine stops at.

    replace(Path("checkpoints/.step_5.tmp"), Path("checkpoints/step_5"));  remove(Path("checkpoints/step_5"))
What is half written or half removed has a name that starts with a dot, and goes with the next start's `sweep`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace(temporary: Path, final: Path) -> None:
    """Renames a finished folder, whose files are synced, onto a place where a damaged one may stand."""
    sync(temporary)
    if final.exists():
        remove(final)
    os.rename(temporary, final)
    sync(final.parent)


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


def write_line(path: Path, line: str) -> None:
    """A file of one line, replaced in one go."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(line + "\n", encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
