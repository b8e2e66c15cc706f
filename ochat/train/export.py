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

from ochat import disk
from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.partial_folder import partial_folder
from ochat.train import checkpoint, serving
from ochat.train.manifest import MANIFEST, Manifest


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
    """Writes `output` from a run folder or a checkpoint folder, without a GPU; returns its step.

    Raises: CheckpointError where there is no checkpoint, or a damaged one (all files but the optimizer's are checked);
    ConfigError where `output` is in the way. Costs: reads the weights twice; holds one file of the output, of at most 5
    GB, and one tensor.
    """
    manifest = find(source)
    _refuse_overwriting(output, overwrite)
    for name in manifest.files:
        if not name.startswith("optimizer-"):
            manifest.check_file(name)
    with partial_folder(output) as temporary:
        model = ModelConfig.load(manifest.folder)
        hf.save(temporary, model, checkpoint.iterate_parameters(manifest), dtype)
        serving.copy(manifest.folder, temporary)
        described = json.loads((manifest.folder / serving.OPENCHAT).read_text(encoding="utf-8"))
        disk.write_json(temporary / serving.OPENCHAT, described | {"step": manifest.step})
        shutil.rmtree(output, ignore_errors=True)
        os.rename(temporary, output)
    return manifest.step


def find(source: Path) -> Manifest:
    """The checkpoint that `source` is, or the newest of the run folder that it is, its files' sizes checked."""
    there = [source] if (source / MANIFEST).is_file() else checkpoint.folders(source)
    if not there:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder with a checkpoint")
    manifest = Manifest.read(there[-1])
    manifest.check_sizes()
    return manifest


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists; add --overwrite to replace it")
    if not (output / serving.OPENCHAT).is_file():
        raise ConfigError(f"{output}: is not an exported model, and is left alone")
