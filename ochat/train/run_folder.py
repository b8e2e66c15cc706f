"""A run's folder: it is made, checked and described here, before the model is loaded.

RUN/config.toml  metrics.jsonl  eval.jsonl  samples.jsonl  bad_steps.jsonl  checkpoints/step_N/  latest  export/
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ochat import config as configuration
from ochat import disk
from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.data.template import Template
from ochat.data.tokenizer import Tokenizer
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.train import checkpoint, serving
from ochat.train.bad_steps import Bins
from ochat.train.parallel import Ranks

CONFIG = "config.toml"
BAD_STEPS = "bad_steps.jsonl"
LINES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", BAD_STEPS)


def open_folder(config: Config, ranks: Ranks) -> Path:
    """The run folder, made where it is missing; ConfigError if it cannot be written or holds another run."""
    folder = Path(config.run.dir)
    if ranks.is_first:
        _refuse_overwriting(folder, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"run.dir = {config.run.dir!r}: cannot be written: {error}") from None
    return folder


def describe(folder: Path, config: Config, template: Template, tokenizer: Tokenizer, classes: tuple[str, ...]) -> None:
    """Writes the resolved configuration and the serving files; called once the run is known to go on."""
    disk.write_text(folder / CONFIG, configuration.dump(config))
    shutil.rmtree(folder / serving.FOLDER, ignore_errors=True)
    serving.write(folder / serving.FOLDER, template, tokenizer, classes)


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
    return [[loader.dataset.place(int(i)) for i in plan.bin(first + b)] for b in range(loader.bins_per_step)]


def _refuse_overwriting(folder: Path, config: Config) -> None:
    if config.run.resume == "never" and checkpoint.folders(folder):
        raise ConfigError(
            f"run.dir = {config.run.dir!r} holds checkpoints of another run and run.resume is 'never': "
            "choose another --run.dir, or remove that folder"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
