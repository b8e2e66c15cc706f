"""Pick the best checkpoint of a run, and say when a run no longer gets better.

    evaluations = read_evaluations(Path("runs/a"));  best_evaluation(evaluations, measure).step
    best_checkpoint(Path("runs/a")).folder;  no_better(Path("runs/a"), 3)

checkpoint.best decides, or else the held-out loss of the expert class. All of it is read from eval.jsonl and
config.toml, so that it is the same after a resume. While a run goes on, save.py (`_prune`) keeps the best one beside
the newest ones (checkpoint.keep_best).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat.checkpoint.measure import ALL, KINDS, LOSS, Measure, measures
from ochat.config import HELD_OUT, ClassConfig, Config, WeightsConfig
from ochat.data.weights import class_weight
from ochat.errors import CheckpointError, ConfigError, OchatError
from ochat.files import jsonl
from ochat.run import layout
from ochat.text.openchat_json import read_description

BEST_KEY = "checkpoint.best"


@dataclass(frozen=True)
class Evaluation:
    """What was measured after `step` steps: nats per token and shares."""

    step: int
    numbers: dict[Measure, float | None]
    checkpoint: Path | None  # of that step, where it exists


@dataclass(frozen=True)
class Choice:
    """The checkpoint that was chosen by a measure, and what it was chosen from."""

    folder: Path
    step: int
    by: Measure
    evaluations: list[Evaluation]


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """The run's evaluations in order of steps; torn lines and those without a number are left out. Raises: OSError."""
    kept = {layout.step_of(folder): folder for folder in layout.checkpoint_folders(run_dir)}
    lines = sorted(jsonl.read_lines(run_dir / layout.EVAL), key=lambda line: line["step"])
    return [Evaluation(step := int(line["step"]), measures(line), kept.get(step)) for line in lines]


def known_measures(evaluations: Sequence[Evaluation]) -> list[Measure]:
    """Every measure that has a number somewhere, as they first occur."""
    return list(dict.fromkeys(m for each in evaluations for m, value in each.numbers.items() if value is not None))


def columns(evaluations: Sequence[Evaluation]) -> list[Measure]:
    """Every measure, for the columns of a table: set by set, the classes as they first occur and then all together."""
    found = list(dict.fromkeys(measure for each in evaluations for measure in each.numbers))
    sets = list(dict.fromkeys(measure.of for measure in found))
    names = [*dict.fromkeys(measure.name for measure in found if measure.name is not None), None]
    return sorted(found, key=lambda m: (sets.index(m.of), names.index(m.name), KINDS.index(m.kind)))


def decisive_measure(run_dir: Path, evaluations: Sequence[Evaluation]) -> Measure:
    """What the best is chosen by: the run's checkpoint.best, or the held-out loss of the expert class.

    The expert is the measured class with the highest weight in the run's [classes]; where they are equal, or the
    records have their own weights, the one that the run serves; else all classes count.
    """
    config = _config(run_dir)
    if config and config.checkpoint.best:
        try:
            return Measure.parse(config.checkpoint.best, BEST_KEY)
        except ConfigError:  # a hand has written it: no run starts with it
            pass
    measured = [m.name for m in known_measures(evaluations) if (m.of, m.kind) == (HELD_OUT, LOSS)]
    weights, served = _class_weights(config.classes, config.weights) if config else {}, _served_class(run_dir)
    if weighed := [name for name in weights if name in measured]:
        return Measure(HELD_OUT, LOSS, max(weighed, key=lambda name: (weights[name], name == served)))
    return Measure(HELD_OUT, LOSS, served if served in measured else None)


def best_evaluation(evaluations: Sequence[Evaluation], by: Measure) -> Evaluation | None:
    """The best by a measure, the earlier of two equal ones; None where none has a number."""
    found = [(by.sign * value, each.step, each) for each in evaluations if (value := each.numbers.get(by)) is not None]
    return min(found, key=lambda one: one[:2])[2] if found else None


def best_step(run_dir: Path) -> int | None:
    """Of the checkpoints that exist, the step of the best one."""
    measured = [each for each in read_evaluations(run_dir) if each.checkpoint]
    best = best_evaluation(measured, decisive_measure(run_dir, measured))
    return best.step if best else None


def no_better(run_dir: Path, most: int) -> str:
    """Why the run ends (train.stop_after = `most`), once so many evaluations in a row were no better than the best
    before them; else ""."""
    evaluations = read_evaluations(run_dir)
    by = decisive_measure(run_dir, evaluations)
    best = best_evaluation(evaluations, by)
    since = sum(each.step > best.step for each in evaluations) if best else 0
    if best is None or since < most:
        return ""
    value = by.shown(best.numbers[by])
    return f"{since} evaluations in a row were no better than {by.best_in_words}, {value} after step {best.step:,}"


def best_checkpoint(run_dir: Path, by: str = "") -> Choice:
    """The checkpoint of the best evaluation.

    `by`: a class or ALL, by its held-out loss; or a measure; empty: as the run decides. Raises: CheckpointError where
    nothing was measured, or the best one's checkpoint is gone; ConfigError for what was not measured.
    """
    if not run_dir.is_dir() or (run_dir / layout.MANIFEST).is_file():
        raise ConfigError(f"{run_dir}: --best chooses among the checkpoints of a run; give the run's folder")
    evaluations = read_evaluations(run_dir)
    if not evaluations:
        raise CheckpointError(
            f"{run_dir}: has no held-out numbers to choose by; train with data.eval_path (`ochat prepare --held-out "
            "0.02` makes such a set), or export one checkpoint by its path"
        )
    measure = _asked(by, evaluations) if by else decisive_measure(run_dir, evaluations)
    chosen = best_evaluation(evaluations, measure)
    if chosen is None:
        known = ", ".join(map(str, known_measures(evaluations)))
        raise ConfigError(
            f"{run_dir}: no evaluation has {measure}; choose with --best-by, there is {known or 'nothing'}"
        )
    if chosen.checkpoint is None:
        raise CheckpointError(_gone(run_dir, evaluations, chosen, measure))
    return Choice(chosen.checkpoint, chosen.step, measure, evaluations)


def _asked(by: str, evaluations: Sequence[Evaluation]) -> Measure:
    """The measure that --best-by names: a class means its held-out loss."""
    known, whole, of_class = known_measures(evaluations), Measure(HELD_OUT, LOSS), Measure(HELD_OUT, LOSS, by)
    if by == ALL and of_class in known:
        raise ConfigError(f"--best-by {by}: there is a class of that name; say {whole} or {of_class}")
    if by == ALL or of_class in known:
        return whole if by == ALL else of_class
    named = [measure for measure in known if str(measure) == by]
    if not named and "." in by:
        named = [measure for measure in known if measure == Measure.parse(by, "--best-by")]
    if not named:
        classes = ", ".join(m.name for m in known if m[:2] == whole[:2] and m.name is not None)
        others = ", ".join(map(str, known))
        raise ConfigError(f"--best-by {by}: no held-out loss of that name; there is {classes}, {ALL}, or {others}")
    return named[0]


def _gone(run_dir: Path, evaluations: Sequence[Evaluation], chosen: Evaluation, by: Measure) -> str:
    """Why there is nothing to export, and what to do now and for the next run."""
    what = f"{run_dir}: {by.best_in_words}, {by.shown(chosen.numbers[by])}, is that of step "
    if chosen.step == 0:
        why = "the base itself before its first step: training has only raised it. Lower optim.lr, or look at the data"
        why = why if by.sign > 0 else why.replace("raised", "lowered")
    else:
        why = (
            "whose checkpoint is not there. For the next run set checkpoint.keep_best = true (or checkpoint.keep = 0, "
            "which keeps all), and the same interval for checkpoint.every and train.eval_every"
        )
    there = best_evaluation([each for each in evaluations if each.checkpoint], by)
    now = f". The best that is there is step {there.step}: ochat export {there.checkpoint} OUT" if there else ""
    return f"{what}{chosen.step}, {why}{now}"


def _config(run_dir: Path) -> Config | None:
    """The run's configuration; None where it cannot be read."""
    try:
        return configuration.load(run_dir / layout.CONFIG)
    except OchatError:
        return None


def _class_weights(classes: dict[str, ClassConfig], weights: WeightsConfig) -> dict[str, float]:
    """The classes' weights; empty where [classes] does not decide them."""
    if weights.source not in ("auto", "classes"):
        return {}
    try:
        return {name: class_weight(entry, name, weights.beta) for name, entry in classes.items()}
    except OchatError:
        return {}


def _served_class(run_dir: Path) -> Any:
    """The class that an exported model answers as unless another is asked for."""
    try:
        return read_description(run_dir / layout.SERVING)["template"]["default_condition"]
    except (OchatError, OSError, LookupError, TypeError):
        return None
