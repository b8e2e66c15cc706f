"""A run's weights as a Hugging Face folder that any server loads: weights, tokenizer, chat template, openchat.json.

    ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`

A checkpoint holds all that is needed; neither the base nor the data has to be there any more.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.partial_folder import partial_folder
from ochat.train import checkpoint, serving


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint as a Hugging Face folder with tokenizer, chat template and openchat.json."""

    source: Path  # a run folder (its newest checkpoint) or a checkpoint folder
    output: Path  # the folder to write
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights
    overwrite: bool = False  # replace an exported folder that is already there


def main(options: ExportOptions) -> None:
    """The command `ochat export`."""
    step = export(options.source, options.output, dtype=options.dtype, overwrite=options.overwrite)
    print(f"exported step {step} to {options.output}")


def export(source: Path, output: Path, *, dtype: str = "bfloat16", overwrite: bool = False) -> int:
    """Writes `output` from a run folder or a checkpoint folder, without a GPU, one tensor at a time; returns its step.

    Raises: CheckpointError where there is no complete checkpoint, ConfigError where `output` is in the way.
    """
    folder = find(source)
    step = checkpoint.read_state(folder)["step"]
    _refuse_overwriting(output, overwrite)
    with partial_folder(output) as temporary:
        model = ModelConfig.load(folder)
        hf.save(temporary, model, hf.iterate_parameters(folder, model), dtype)
        serving.copy(folder, temporary)
        described = json.loads((folder / serving.OPENCHAT).read_text(encoding="utf-8"))
        serving.write_json(temporary / serving.OPENCHAT, described | {"step": step})
        shutil.rmtree(output, ignore_errors=True)
        os.rename(temporary, output)
    return step


def find(source: Path) -> Path:
    """The checkpoint folder that `source` is, or the newest complete one of the run folder that it is."""
    if (source / checkpoint.STATE).is_file():
        return source
    found = checkpoint.complete(source)
    if not found:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder with a complete checkpoint")
    return found[-1]


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists; add --overwrite to replace it")
    if not (output / serving.OPENCHAT).is_file():
        raise ConfigError(f"{output}: is not an exported model, and is left alone")
