"""Pick the best checkpoint of a run: the one with the lowest held-out loss of one class, by default the expert's.

evaluations = read_evaluations(Path("runs/a"));  best_evaluation(evaluations, "GPT4").step
best_checkpoint(Path("runs/a")).folder

While a run goes on, save.py (`_prune`) keeps the best one beside the newest ones (checkpoint.keep_best).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat.data.weights import class_weight
from ochat.errors import CheckpointError, ConfigError, OchatError
from ochat.files import jsonl
from ochat.files.jsonl import finite_number
from ochat.run import layout
from ochat.text.openchat_json import read_description

ALL = "all"  # the weighted mean over all classes, where a class is named


@dataclass(frozen=True)
class Evaluation:
    """Held-out means after `step` steps: nats per token and the share of tokens that are right."""

    step: int
    losses: dict[str, float | None]  # by class, and ALL
    accuracies: dict[str, float | None]
    checkpoint: Path | None  # of that step, where it exists


@dataclass(frozen=True)
class Choice:
    """The checkpoint that was chosen, by the held-out loss of the class `by`, and what it was chosen from."""

    folder: Path
    step: int
    by: str
    evaluations: list[Evaluation]


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The run's evaluations in order of steps; torn lines and those without a number are left out. Raises: OSError."""
    kept = {layout.step_of(folder): folder for folder in layout.checkpoint_folders(run_dir)}
    lines = sorted(jsonl.read_lines(run_dir / layout.EVAL), key=lambda line: line["step"])
    return [_evaluation(line, kept) for line in lines]


def expert_class(run_dir: Path, evaluations: Sequence[Evaluation]) -> str:
    """The measured class with the highest weight in the run's [classes]; where they are equal, or the records have
    their own weights, the one that the run serves; else ALL."""
    measured = [name for each in evaluations for name, loss in each.losses.items() if loss is not None and name != ALL]
    weights, served = _class_weights(run_dir), _served_class(run_dir)
    if weighed := [name for name in weights if name in measured]:
        return max(weighed, key=lambda name: (weights[name], name == served))
    return served if served in measured else ALL


def best_evaluation(evaluations: Sequence[Evaluation], by: str) -> Evaluation | None:
    """The one with the lowest held-out loss of the class `by`, the earlier of two equal ones; None where none has
    one."""
    measured = [(loss, each.step, each) for each in evaluations if (loss := each.losses.get(by)) is not None]
    return min(measured, key=lambda found: found[:2])[2] if measured else None


def best_step(run_dir: Path) -> int | None:
    """Of the checkpoints that exist, the step with the lowest held-out loss of the expert class."""
    measured = [each for each in read_evaluations(run_dir) if each.checkpoint]
    best = best_evaluation(measured, expert_class(run_dir, measured))
    return best.step if best else None


def best_checkpoint(run_dir: Path, by: str = "") -> Choice:
    """The checkpoint of the best evaluation.

    `by`: a class, or ALL; empty: the expert's. Raises: CheckpointError where nothing was measured, or the best one's
    checkpoint is gone; ConfigError for a class that was not measured.
    """
    if not run_dir.is_dir() or (run_dir / layout.MANIFEST).is_file():
        raise ConfigError(f"{run_dir}: --best chooses among the checkpoints of a run; give the run's folder")
    evaluations = read_evaluations(run_dir)
    if not evaluations:
        raise CheckpointError(
            f"{run_dir}: has no held-out numbers to choose by; train with data.eval_path (`ochat prepare --held-out "
            "0.02` makes such a set), or export one checkpoint by its path"
        )
    by = by or expert_class(run_dir, evaluations)
    chosen = best_evaluation(evaluations, by)
    if chosen is None:
        known = ", ".join(dict.fromkeys(name for each in evaluations for name in each.losses))
        raise ConfigError(f"--best-by {by}: no held-out loss of that name; there is {known}")
    if chosen.checkpoint is None:
        raise CheckpointError(_gone(run_dir, evaluations, chosen, by))
    return Choice(chosen.checkpoint, chosen.step, by, evaluations)


def loss_label(by: str) -> str:
    """What a best one was chosen by, in words."""
    return "all classes, weighted" if by == ALL else by or "(no class)"


def _evaluation(line: dict[str, Any], kept: dict[int, Path]) -> Evaluation:
    step, classes = int(line["step"]), line.get("classes")
    rows = {ALL: line} | (classes if isinstance(classes, dict) else {})
    rows = {name: row for name, row in rows.items() if isinstance(row, dict)}
    losses, accuracies = ({n: finite_number(r.get(key)) for n, r in rows.items()} for key in ("loss", "accuracy"))
    return Evaluation(step, losses, accuracies, kept.get(step))


def _gone(run_dir: Path, evaluations: Sequence[Evaluation], chosen: Evaluation, by: str) -> str:
    """Why there is nothing to export, and what to do now and for the next run."""
    what = f"{run_dir}: the lowest held-out loss of {loss_label(by)}, {chosen.losses[by]:.4f}, is that of step "
    if chosen.step == 0:
        why = "the base itself before its first step: training has only raised it. Lower optim.lr, or look at the data"
    else:
        why = (
            "whose checkpoint is not there. For the next run set checkpoint.keep_best = true (or checkpoint.keep = 0, "
            "which keeps all), and the same interval for checkpoint.every and train.eval_every"
        )
    there = best_evaluation([each for each in evaluations if each.checkpoint], by)
    now = f". The best that is there is step {there.step}: ochat export {there.checkpoint} OUT" if there else ""
    return f"{what}{chosen.step}, {why}{now}"


def _class_weights(run_dir: Path) -> dict[str, float]:
    """The classes' weights by the run's configuration; empty where it does not say."""
    try:
        config = configuration.load(run_dir / layout.CONFIG)
        if config.weights.source not in ("auto", "classes"):
            return {}
        return {name: class_weight(entry, name, config.weights.beta) for name, entry in config.classes.items()}
    except OchatError:
        return {}


def _served_class(run_dir: Path) -> Any:
    """The class that an exported model answers as unless another is asked for."""
    try:
        return read_description(run_dir / layout.SERVING)["template"]["default_condition"]
    except (OchatError, OSError, LookupError, TypeError):
        return None
