"""Merges the LoRA adapters of a checkpoint into their base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import BASE, Manifest
from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf, peft
from ochat.model.config import ModelConfig
from ochat.model.lora import digest


def are_in(manifest: Manifest) -> bool:
    """Whether a checkpoint holds adapters instead of a whole model."""
    return BASE in manifest.identity


def merged(manifest: Manifest, model: ModelConfig, base: str) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter of a checkpoint's adapters merged into their base, read where the run had
    it or at `base`.

    Raises: CheckpointError where another base lies there; ConfigError where none does.
    """
    settings = peft.AdapterConfig.read(manifest.folder)
    folder = Path(base or settings.base)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: the base of {manifest.folder} is not there; say with --base where it is")
    found = digest(folder, model)
    if found != manifest.identity[BASE]:
        raise CheckpointError(
            f"{folder}: not the base of {manifest.folder} (its weights' digest is {found}, not "
            f"{manifest.identity[BASE]}); name the right folder with --base"
        )
    adapter = dict(checkpoint.iterate_parameters(manifest))
    yield from peft.merged(hf.read_tensors(folder, model), model, settings, adapter)
