"""The whole parameters of a checkpoint: as they are, or its LoRA adapters merged into their base model.

hf.save(out, model_config, whole_parameters(manifest, model_config), "bfloat16")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ochat.checkpoint.load import iterate_parameters
from ochat.checkpoint.manifest import BASE, Manifest
from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig


def holds_adapters(manifest: Manifest) -> bool:
    """Whether a checkpoint holds adapters instead of a whole model."""
    return BASE in manifest.identity


def whole_parameters(manifest: Manifest, model: ModelConfig, base: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, one at a time; adapters are merged into their base, which is read from
    `base` or from where the run had it.

    Raises: CheckpointError for another base; ConfigError where none is there.
    """
    if not holds_adapters(manifest):
        return iterate_parameters(manifest)
    adapter_config = peft.AdapterConfig.read(manifest.folder)
    folder = Path(base or adapter_config.base)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: the base of {manifest.folder} is not there; say with --base where it is")
    found = lora.base_digest(folder, model)
    if found != manifest.identity[BASE]:
        raise CheckpointError(
            f"{folder}: not the base of {manifest.folder} (its weights' digest is {found}, not "
            f"{manifest.identity[BASE]}); name the right folder with --base"
        )
    adapter = dict(iterate_parameters(manifest))
    return peft.merged_parameters(hf.read_tensors(folder, model), model, adapter_config, adapter)
