"""Check that data, tokenizer and model belong together, and record what a run is: its identity, plan and settings."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat import overrides
from ochat.checkpoint.manifest import LAST_CONDITIONED
from ochat.config import DataConfig
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.errors import ConfigError
from ochat.files import atomic, jsonl
from ochat.model.config import ModelConfig, settings
from ochat.run import layout
from ochat.run.nonfinite import Bins
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PLAN_STATS = ("num_steps", "steps_per_epoch", "fill", "imbalance_mean", "imbalance_worst")
PLAN_POINTS = 1000  # points of the balance curve in plan.json
OF_A_START = ("run.dir", "run.resume", "run.resume_mismatched")  # settings that change no step
log = logging.getLogger(__name__)


def check_inputs(
    dataset: TokenDataset, held_out: Iterable[TokenDataset], tokenizer: Tokenizer, model: ModelConfig, base_path: str
) -> None:
    """Raises: ConfigError unless data, held-out sets, tokenizer and model belong together."""
    for each in (dataset, *held_out):
        if each.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
            raise ConfigError(
                f"{each.path}: prepared with another tokenizer than {base_path} holds; prepare it with this base"
            )
        if replace(each.template, context=0) != replace(dataset.template, context=0):
            raise ConfigError(f"{each.path}: prepared with another template or --conditions than {dataset.path}")
        longest, context = int(each.lengths.max(initial=0)), model.max_position_embeddings
        if longest > context and model.rope.kind == "dynamic":
            raise ConfigError(
                f"{each.path}: a conversation has {longest:,} tokens, but beyond max_position_embeddings = {context:,} "
                f"dynamic RoPE scaling changes the base, which is not implemented; prepare it with --context {context}"
            )
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{base_path}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embedding {model.vocab_size} "
            f"rows; make a base with as many: ochat init-base --hf {base_path} OUT --add-token TOKEN"
        )


def check_classes(key: str, names: Iterable[str], dataset: TokenDataset) -> None:
    """Raises: ConfigError where `key` names a class that the data lacks; no class ("") always passes."""
    for name in names:
        if name and name not in dataset.class_names:
            raise ConfigError(
                f"{key} names {name!r}; the classes of {dataset.path} are {', '.join(dataset.class_names)}"
            )


def served_template(dataset: TokenDataset) -> Template:
    """The data's template. If no trained class has its default condition, the default becomes the class of the highest
    reward where `prepare --condition-from` made classes of rewards, else that of the largest mean |weight|."""
    if dataset.template.default_condition in dataset.present:
        return dataset.template
    if levels := [name for name in dataset.levels if name in dataset.present]:
        return replace(dataset.template, default_condition=levels[-1])
    weights = {name: dataset.mean_weight(name) for name in dataset.present}
    return replace(dataset.template, default_condition=max(weights, key=lambda name: weights[name]))


def identity(loader: Loader, model: ModelConfig, data: DataConfig, seed: int) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must have in common, as name -> short value."""
    plan = loader.plan_before_cooldown()
    drawn = {f"condition.{name}": getattr(loader.conditions, name, None) for name in ("dropout", "goals")}
    drawn[LAST_CONDITIONED] = loader.cooldown if loader.cooldown < loader.num_steps else None
    return {
        "model": _digest(json.dumps(settings(model), sort_keys=True).encode()),
        "template": loader.dataset.template.name,
        "data set": loader.dataset.fingerprint[:16],
        "run.seed": seed,
        "data.token_budget": data.token_budget,
        "data.bins_per_step": data.bins_per_step,
        "order of the data": _digest(plan.indices.tobytes() + plan.bin_offsets.tobytes()),
    } | {name: value for name, value in drawn.items() if value not in (None, 0.0, "own")}


def write_plan(folder: Path, loader: Loader, facts: dict[str, str]) -> None:
    """Write plan.json: the run's steps, how they are packed, and the facts that it announces.

    `imbalance`: max over mean FLOPs of the bins of a step, for all steps of the first epoch but the last; the worst of
    each `steps_each` of them.
    """
    stats, imbalance = loader.stats(), loader.plan(0).cost_imbalance()
    each = max(math.ceil(len(imbalance) / PLAN_POINTS), 1)
    worst = [float(imbalance[first : first + each].max()) for first in range(0, len(imbalance), each)]
    record: dict[str, Any] = {name: getattr(stats, name) for name in PLAN_STATS}
    record |= {"imbalance": {"steps_each": each, "worst": worst}, "facts": facts}
    atomic.write_json(folder / layout.PLAN, record)


def record_config(folder: Path, toml: str, *, step: int, num_steps: int) -> None:
    """Write the settings `toml` as config.toml for a run that has done `step` of its `num_steps` steps.

    Different settings of earlier steps are kept as config.until_step_N.toml, and the differences are logged. A run that
    has no step left keeps the settings that it was made with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / layout.CONFIG
    changes = ", ".join(_differences(path, toml)) if step else ""
    if changes and step >= num_steps:
        log.info("%s stays as the run was made; not used: %s", layout.CONFIG, changes)
        return
    if changes:
        earlier = folder / layout.config_until(step)
        if not earlier.exists():  # else nothing that was trained after it is left
            atomic.write_text(earlier, path.read_text(encoding="utf-8"))
        log.info("settings differ from step %d on; %s keeps the earlier ones: %s", step + 1, earlier.name, changes)
    atomic.write_text(path, toml)


def schedule_warning(folder: Path, step: int, num_steps: int, rate_at: Callable[[int], float]) -> str:
    """How the settings of this start change the learning rate of a run that has done `step` steps, or that they ask for
    fewer; else "". `rate_at`: of a step, counted from 0, by these settings."""
    if step > num_steps:
        return (
            f"{step:,} steps are done, and the settings ask for {num_steps:,}: nothing is trained, and the model stays "
            "as it is"
        )
    made = next((line.get("lr") for line in jsonl.read_lines(folder / layout.METRICS) if line["step"] == step), None)
    last = jsonl.finite_number(made)
    if last is None or step == num_steps or math.isclose(last, rate_at(step - 1), rel_tol=1e-6):
        return ""
    return (
        f"the learning rate changes: step {step:,} was made with {last:.3g}, where these settings have "
        f"{rate_at(step - 1):.3g}; step {step + 1:,} of {num_steps:,} goes on with {rate_at(step):.3g}. Only a new "
        "run from the base follows one schedule"
    )


def bins_of(loader: Loader, step: int) -> Bins:
    """ "file:line" of the conversations in each bin of a step (counted from 0)."""
    epoch, step_in_epoch = loader.position(step)
    plan, first = loader.plan(epoch), step_in_epoch * loader.bins_per_step
    return [[loader.dataset.source_location(int(i)) for i in plan.bin(first + b)] for b in range(loader.bins_per_step)]


def _differences(path: Path, toml: str) -> list[str]:
    """How settings differ from those of a file, as "optim.lr 2e-05 (was 1e-05)"; nothing for a file that has none."""
    try:
        tree = configuration.with_new_names(overrides.read_toml(path))
    except ConfigError:
        return []
    old, new = (
        {name: value for name, value in configuration.flatten(each) if value != {} and name not in OF_A_START}
        for each in (tree, tomllib.loads(toml))
    )
    changed = [name for name in {**new, **old} if old and old.get(name) != new.get(name)]
    return [f"{name} {new.get(name, 'not set')} (was {old.get(name, 'not set')})" for name in changed]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
