"""Names of every file and folder in a run folder, each once.

RUN/config.toml  config.until_step_N.toml  plan.json  attention.json  metrics.jsonl  eval.jsonl  samples.jsonl
    answers.jsonl  nonfinite_steps.jsonl  checkpoints/step_N/  latest  serving/  export/  profile/  tensorboard/
    swap.json  wandb_id  .lock  metrics.damaged.jsonl (and of each other file of lines)
"""

from __future__ import annotations

import re
from pathlib import Path

CONFIG, PLAN, ATTENTION, SWAP = "config.toml", "plan.json", "attention.json", "swap.json"
METRICS, EVAL, SAMPLES, NONFINITE = "metrics.jsonl", "eval.jsonl", "samples.jsonl", "nonfinite_steps.jsonl"
ANSWERS = "answers.jsonl"  # of the exact-match tasks
EVALUATION = (ANSWERS, SAMPLES, EVAL)  # of one evaluation, in the order of writing
LINES = (METRICS, *EVALUATION, NONFINITE)  # appended to while a run trains, cut where it resumes
EARLIER_NONFINITE = "bad_steps.jsonl"  # of earlier versions
CHECKPOINTS, LATEST, MANIFEST = "checkpoints", "latest", "manifest.json"
SERVING, EXPORT, PROFILE, TENSORBOARD = "serving", "export", "profile", "tensorboard"
LOCK = ".lock"
WANDB = "wandb_id"
STEP_PREFIX = "step_"

_STEP = re.compile(STEP_PREFIX + "(0|[1-9][0-9]*)")


def run_of(model: Path) -> Path | None:
    """The run folder that `model` is, or whose export it is; None for any other model."""
    folder = model.resolve()
    folder = folder.parent if folder.name == EXPORT else folder
    return folder if (folder / CONFIG).is_file() else None


def damaged(lines: Path) -> Path:
    """The file that keeps damaged lines of a file of lines, such as metrics.damaged.jsonl."""
    return lines.with_suffix(f".damaged{lines.suffix}")


def config_until(step: int) -> str:
    """The file that keeps the settings of the steps up to `step`."""
    return f"config.until_step_{step}.toml"


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint folder after `step` steps."""
    return f"{STEP_PREFIX}{step}"


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first, complete or not."""
    found = [path for path in (run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*") if _STEP.fullmatch(path.name)]
    return sorted(filter(Path.is_dir, found), key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix(STEP_PREFIX))
