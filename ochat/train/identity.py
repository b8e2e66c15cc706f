"""Checks that data, tokenizer and model belong together, and records what a run is: its identity and its plan."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.errors import ConfigError
from ochat.export import serving
from ochat.files import atomic
from ochat.model.config import ModelConfig
from ochat.run.layout import PLAN
from ochat.run.nonfinite import Bins
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PLAN_POINTS = 1000  # of the balance of an epoch's steps


def describe(folder: Path, template: Template, tokenizer: Tokenizer, classes: tuple[str, ...]) -> None:
    """Writes the serving files; called once the run is known to go on."""
    shutil.rmtree(folder / serving.FOLDER, ignore_errors=True)
    serving.write(folder / serving.FOLDER, template, tokenizer, classes)


def write_plan(folder: Path, loader: Loader, facts: dict[str, str]) -> None:
    """Writes what the run is going to do: its steps, how they are packed, and the facts that it announces.

    `imbalance`: max over mean work among the bins of a step, of the first epoch's steps but the last, the worst of each
    `steps_each` of them.
    """
    stats, imbalance = loader.stats(), loader.plan(0).cost_imbalance()
    each = max(math.ceil(len(imbalance) / PLAN_POINTS), 1)
    worst = [float(imbalance[first : first + each].max()) for first in range(0, len(imbalance), each)]
    record = {
        "num_steps": stats.num_steps,
        "steps_per_epoch": list(stats.steps_per_epoch),
        "fill": stats.fill,
        "imbalance_mean": stats.imbalance_mean,
        "imbalance_worst": stats.imbalance_worst,
        "imbalance": {"steps_each": each, "worst": worst},
        "facts": facts,
    }
    atomic.write_json(folder / PLAN, record)


def identity(config: Config, model: ModelConfig, loader: Loader) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues from it, as name -> short value."""
    shape = {key: value for key, value in asdict(model).items() if key != "dtype"}
    plan = loader.plan(0)
    return {
        "model": _digest(json.dumps(shape, sort_keys=True, default=str).encode()),
        "template": loader.dataset.template.name,
        "data set": loader.dataset.fingerprint[:16],
        "run.seed": config.run.seed,
        "data.token_budget": config.data.token_budget,
        "data.bins_per_step": config.data.bins_per_step,
        "order of the data": _digest(plan.indices.tobytes() + plan.bin_offsets.tobytes()),
    }


def check_data(
    data: TokenDataset, held_out: Loader | None, tokenizer: Tokenizer, model: ModelConfig, config: Config
) -> None:
    """Raises ConfigError unless data, held-out data, tokenizer and model belong together."""
    base = config.base.path
    for each in (data, *([held_out.dataset] if held_out else [])):
        if each.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
            raise ConfigError(
                f"{each.path}: prepared with another tokenizer than {base} holds; prepare it with this base"
            )
        if replace(each.template, context=0) != replace(data.template, context=0):
            raise ConfigError(f"{each.path}: prepared with another template or --conditions than {data.path}")
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{base}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, its embedding {model.vocab_size} rows; "
            f"make a base with as many: ochat init-base --hf {base} OUT --add-token TOKEN"
        )


def bins_of(loader: Loader, step: int) -> Bins:
    """Where the conversations of each bin of a step (counted from 0) stand in the input."""
    epoch, step_in_epoch = loader.position(step)
    plan, first = loader.plan(epoch), step_in_epoch * loader.bins_per_step
    return [[loader.dataset.source_location(int(i)) for i in plan.bin(first + b)] for b in range(loader.bins_per_step)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
