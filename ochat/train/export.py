"""A run's weights as a Hugging Face folder that any server loads: weights, tokenizer, chat template, openchat.json.

    ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`

The chat template takes `condition` and defaults to the expert class; before the folder gets its name, the exported
tokenizer and template are checked to give training's ids.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ochat import config as configuration
from ochat.data import chat_template, tokenizer_export
from ochat.data import tokenizer as tokenizers
from ochat.data.shards import read_manifest
from ochat.data.template import Template
from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.train import checkpoint, run_folder


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint as a Hugging Face folder with tokenizer, chat template and openchat.json."""

    source: Path  # a run folder (its newest checkpoint) or a checkpoint folder
    output: Path  # the folder to write
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights
    overwrite: bool = False  # replace an exported folder that is already there


def main(options: ExportOptions) -> None:
    """The command `ochat export`."""
    export(options.source, options.output, dtype=options.dtype, overwrite=options.overwrite)
    print(f"exported {options.output}")


def export(source: Path, output: Path, *, dtype: str = "bfloat16", overwrite: bool = False) -> None:
    """Writes `output` from a run folder or a checkpoint folder, without a GPU, one tensor at a time.

    Raises: CheckpointError where there is no checkpoint or the exported tokenizer would not give training's ids;
    ConfigError where `output` exists.
    """
    folder = _checkpoint(source)
    _refuse_overwriting(output, overwrite)
    config = configuration.load(folder.parent.parent / run_folder.CONFIG)
    spoken = Template.from_dict(read_manifest(Path(config.data.path))["template"])
    tokenizer = tokenizers.load(config.base.path)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary, ModelConfig.load(folder), folder, spoken, tokenizer, getattr(torch, dtype))
    _describe(temporary, spoken, folder)
    if overwrite:
        shutil.rmtree(output, ignore_errors=True)
    os.rename(temporary, output)


def write(
    output: Path, model: ModelConfig, weights: Path, spoken: Template, tokenizer: Any, dtype: torch.dtype
) -> None:
    """The weights in `weights` (a Hugging Face folder) with tokenizer, chat template and generation settings into
    `output`."""
    hf.save(output, model, hf.iterate_parameters(weights, model), dtype)
    tokenizer_export.export(
        tokenizer, output, chat_template=chat_template.render(spoken, tokenizer), eos_token=spoken.eot
    )
    chat_template.verify(output, spoken, tokenizer)
    settings = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special_tokens[spoken.eot],
        "do_sample": False,
    }
    _write_json(output / "generation_config.json", settings)


def _describe(output: Path, spoken: Template, folder: Path) -> None:
    """openchat.json: the template under the name that OpenChat's server reads, and what ours needs to talk to the
    model."""
    state = checkpoint.read_state(folder)
    content = {
        "model_type": spoken.name,
        "template": spoken.to_dict(),
        "step": state["step"],
        "identity": state["identity"],
    }
    _write_json(output / "openchat.json", content)


def _checkpoint(source: Path) -> Path:
    if (source / checkpoint.STATE).is_file():
        return source.resolve()
    found = checkpoint.complete(source)
    if not found:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder with a complete checkpoint")
    return found[-1].resolve()


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if output.exists() and not (overwrite and (output / "openchat.json").is_file()):
        what = "is not an exported model" if overwrite else "exists; add --overwrite to replace it"
        raise ConfigError(f"{output}: {what}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
