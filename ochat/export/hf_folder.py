"""Write a run's weights as a Hugging Face folder: weights, tokenizer, chat template, openchat.json.

    step = export(Path("runs/a"), Path("exported/a"))

A checkpoint holds all that is needed; neither the base nor the data is read. A checkpoint of adapters needs its base,
with which they are merged; `export_adapter` writes them alone, for PEFT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import Manifest, copy_serving_files
from ochat.errors import CheckpointError, ConfigError
from ochat.export import merge, serving
from ochat.files import atomic, checksums
from ochat.model import hf, peft
from ochat.model.config import ModelConfig
from ochat.run import layout
from ochat.run.layout import MANIFEST
from ochat.text.openchat_json import OPENCHAT


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
        copy_serving_files(manifest.folder, temporary)
        described = json.loads((manifest.folder / OPENCHAT).read_text(encoding="utf-8"))
        atomic.write_json(temporary / OPENCHAT, described | {"step": manifest.step})
        if condition is not None:
            serving.set_default_condition(temporary, condition)
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


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists; add --overwrite to replace it")
    if not (output / OPENCHAT).is_file():
        raise ConfigError(f"{output}: is not an exported model, and is left alone")
