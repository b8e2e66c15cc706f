"""The held-out sets and tasks of a run, by name: that of data.eval_path, and those of [eval].

sets = open_sets(paths(config.data.eval_path, config.eval), config.classes, config.weights)
tasks = open_tasks(config.eval, dataset, template, tokenizer, context=4096)
check_best(config.checkpoint.best, sets, tasks)
"""

from __future__ import annotations

from collections.abc import Mapping

from ochat.checkpoint.best import BEST_KEY
from ochat.checkpoint.measure import ACCURACY, EXACT, LOSS, Measure, class_label
from ochat.config import HELD_OUT, ClassConfig, EvalConfig, WeightsConfig
from ochat.data.dataset import Paths, TokenDataset
from ochat.errors import ConfigError
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer
from ochat.train import identity
from ochat.train.evaluations.exact import ExactTask


def paths(eval_path: str | tuple[str, ...], sets: Mapping[str, EvalConfig]) -> dict[str, Paths]:
    """The folders of the sets whose loss is measured."""
    first: dict[str, Paths] = {HELD_OUT: eval_path} if eval_path else {}
    return first | {name: each.path for name, each in sets.items() if each.task == "loss"}


def open_sets(
    found: Mapping[str, Paths], classes: Mapping[str, ClassConfig], weights: WeightsConfig
) -> dict[str, TokenDataset]:
    """Those sets, whole: classes that are not trained on included, with the configured weights."""
    return {name: TokenDataset(path, classes=classes, weights=weights) for name, path in found.items()}


def open_tasks(
    sets: Mapping[str, EvalConfig], dataset: TokenDataset, template: Template, tokenizer: Tokenizer, context: int
) -> dict[str, ExactTask]:
    """The exact-match tasks. `dataset`: what is trained on, `template`: with the class that the model is served as,
    `context`: the model's. Raises: ConfigError for a class that the data lacks; as ExactTask.read."""
    tasks = {}
    for name, each in sets.items():
        if each.task == "exact":
            identity.check_classes(f"eval.{name}.conditions", each.conditions, dataset)
            conditions = tuple(dict.fromkeys(each.conditions)) or (template.default_condition,)
            files = [each.path] if isinstance(each.path, str) else each.path
            tasks[name] = ExactTask.read(files, conditions, each.max_new_tokens, template, tokenizer, context)
    return tasks


def check_best(best: str, sets: Mapping[str, TokenDataset], tasks: Mapping[str, ExactTask]) -> None:
    """Raises: ConfigError for a checkpoint.best, unless it is empty, that no evaluation of this run has."""
    if not best:
        return
    measure = Measure.parse(best, BEST_KEY)
    known = dict.fromkeys(sets, (LOSS, ACCURACY)) | dict.fromkeys(tasks, (EXACT,))
    if measure.of not in known:
        names = ", ".join(known) or "none; data.eval_path or [eval] names them"
        raise ConfigError(f"{BEST_KEY} = {best!r}: no held-out set is called {measure.of!r}; there is {names}")
    if measure.kind not in known[measure.of]:
        raise ConfigError(f"{BEST_KEY} = {best!r}: of {measure.of} there is {' and '.join(known[measure.of])}")
    if measure.of in tasks:
        names = dict.fromkeys(each.condition for each in tasks[measure.of].questions)
    else:
        names = sets[measure.of].class_names
    if measure.name is not None and measure.name not in names:
        raise ConfigError(
            f"{BEST_KEY} = {best!r}: {measure.of} has no class {measure.name!r}; it has "
            f"{', '.join(map(class_label, names))}, and without a class all count"
        )
