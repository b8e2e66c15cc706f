"""A run's weights as a Hugging Face folder that any server loads: weights, tokenizer, chat template, openchat.json.

    ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`
    ochat export runs/a exported/a --best     the one with the lowest held-out loss of the expert class

A checkpoint holds all that is needed; neither the base nor the data has to be there any more. One of adapters needs its
base, with which they are merged; `--adapter` writes them alone, for PEFT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from torch import Tensor

from ochat.checkpoint import best as best_module
from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import Manifest
from ochat.console import waiting
from ochat.errors import CheckpointError, ConfigError
from ochat.export import merge, serving
from ochat.files import atomic, checksums
from ochat.model import hf, peft
from ochat.model.config import ModelConfig
from ochat.run import layout
from ochat.run.layout import MANIFEST


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint as a Hugging Face folder with tokenizer and chat template."""

    source: Path  # a run folder (its newest checkpoint) or a checkpoint folder
    output: Path  # the folder to write
    best: bool = False  # of a run: not the newest checkpoint, but the one with the lowest held-out loss
    best_by: str = ""  # the class whose held-out loss decides, or all; left out: the class with the highest weight
    condition: str | None = None  # the class that its chat template speaks as where none is named; "": none
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the written weights
    adapter: bool = False  # of a run with [lora]: write the adapter as PEFT's files instead of the merged model
    base: str = ""  # of a run with [lora]: where its base lies now; empty: where the run had it
    overwrite: bool = False  # replace an exported folder that is already there


def main(options: ExportOptions) -> None:
    """The command `ochat export`."""
    source = _best(options) if options.best or options.best_by else options.source
    with waiting("exporting"):
        if options.adapter:
            step = export_adapter(source, options.output, overwrite=options.overwrite, condition=options.condition)
        else:
            step = export(
                source,
                options.output,
                dtype=options.dtype,
                overwrite=options.overwrite,
                base=options.base,
                condition=options.condition,
            )
    print(f"exported step {step} to {options.output}")


def export(
    source: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    base: str = "",
    condition: str | None = None,
) -> int:
    """Writes `output` from a run folder or a checkpoint folder, without a GPU; returns its step.

    `condition`: the class that the chat template takes where none is named; None: the expert's, as the run had it.
    Adapters are merged into their base, read from `base` or from where the run had it. Raises: CheckpointError where
    there is no checkpoint, a damaged one (all files but the optimizer's are checked) or another base; ConfigError where
    `output` is in the way, the base is gone, or no prefix carries the condition. Costs: reads the weights twice, and
    what was written once, for SHA256SUMS; holds one file of the output, of at most 5 GB, and one tensor.
    """
    with _opened(source, output, overwrite, condition) as (manifest, folder):
        model = ModelConfig.load(manifest.folder)
        if merge.are_in(manifest):
            (folder / peft.CONFIG).unlink()  # a loader would look for the adapter's weights
        hf.save(folder, model, whole_parameters(manifest, model, base), dtype)
    return manifest.step


def export_adapter(source: Path, output: Path, *, overwrite: bool = False, condition: str | None = None) -> int:
    """Writes a run's adapters into `output` as PEFT loads them; returns the step.

    Raises: as export; ConfigError where the run has no adapters.
    """
    with _opened(source, output, overwrite, condition) as (manifest, folder):
        if not merge.are_in(manifest):
            raise ConfigError(
                f"{manifest.folder}: has no adapter, all weights were trained; export it without --adapter"
            )
        settings, tensors = peft.AdapterConfig.read(manifest.folder), dict(checkpoint.iterate_parameters(manifest))
        peft.save(folder, ModelConfig.load(manifest.folder), settings, tensors)
    return manifest.step


@contextmanager
def _opened(source: Path, output: Path, overwrite: bool, condition: str | None) -> Iterator[tuple[Manifest, Path]]:
    """A checked checkpoint, and a folder with the serving files that becomes `output` when its weights are there."""
    manifest = find(source)
    _refuse_overwriting(output, overwrite)
    check_weights(manifest)
    with atomic.staging_dir(output) as temporary:
        serving.copy(manifest.folder, temporary)
        described = json.loads((manifest.folder / serving.OPENCHAT).read_text(encoding="utf-8"))
        atomic.write_json(temporary / serving.OPENCHAT, described | {"step": manifest.step})
        if condition is not None:
            serving.speak_as(temporary, condition)
        yield manifest, temporary
        checksums.write(temporary)
        shutil.rmtree(output, ignore_errors=True)
        os.rename(temporary, output)


def find(source: Path) -> Manifest:
    """The checkpoint that `source` is, or the newest of the run folder that it is, its files' sizes checked."""
    there = [source] if (source / MANIFEST).is_file() else layout.checkpoint_folders(source)
    if not there:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder with a checkpoint")
    manifest = Manifest.read(there[-1])
    manifest.check_sizes()
    return manifest


def check_weights(manifest: Manifest) -> None:
    """Raises: CheckpointError naming a damaged file; the optimizer's are left alone. Costs: reads the others once."""
    for name in manifest.files:
        if not name.startswith("optimizer-"):
            manifest.check_file(name)


def whole_parameters(manifest: Manifest, model: ModelConfig, base: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, adapters merged into their base. Raises: as export."""
    if merge.are_in(manifest):
        return merge.merged(manifest, model, base)
    return checkpoint.iterate_parameters(manifest)


def _best(options: ExportOptions) -> Path:
    """The checkpoint that --best means, after the table it was chosen from is printed."""
    if not options.best:
        raise ConfigError(f"--best-by {options.best_by}: says what --best goes by; add --best")
    chosen, table = best_module.best_checkpoint(options.source, options.best_by)
    Console(highlight=False).print(table)
    return chosen


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists; add --overwrite to replace it")
    if not (output / serving.OPENCHAT).is_file():
        raise ConfigError(f"{output}: is not an exported model, and is left alone")
