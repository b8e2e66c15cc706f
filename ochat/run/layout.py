"""Names every file and folder of a run folder."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER, LATEST = "checkpoints", "latest"


NAME = re.compile("step_(0|[1-9][0-9]*)")


def folders(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first, whole or not."""
    found = [path for path in (run_dir / FOLDER).glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(folder.name.removeprefix("step_"))


MANIFEST = "manifest.json"


PLAN = "plan.json"


BAD_STEPS = "bad_steps.jsonl"


LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", BAD_STEPS)
