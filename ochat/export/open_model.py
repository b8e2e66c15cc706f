"""Open any model folder: an exported or Hugging Face folder, a checkpoint, or a run (its newest checkpoint).

model = open_model(Path("runs/mine"), dtype="bfloat16", device="cpu")
tokenizer.load(folder_of(Path("runs/mine")))
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from ochat.checkpoint.load import iterate_parameters, open_checkpoint
from ochat.checkpoint.manifest import BASE, KINDS, Manifest, verify_weights
from ochat.errors import CheckpointError, ConfigError
from ochat.export.serving import eos_ids_of
from ochat.model import hf, lora, peft
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.run import layout
from ochat.text.openchat_json import read_description
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer


def folder_of(source: Path) -> Path:
    """The folder with tokenizer and openchat.json: the newest checkpoint of a run, else `source` itself.

    Raises: ConfigError where there is no folder; CheckpointError for an incomplete checkpoint.
    """
    read_description(source)
    return open_checkpoint(source).folder if _is_trained(source) else source


def open_model(source: Path, *, dtype: str, device: str, base: str = "") -> Transformer:
    """The whole model, on the reference kernels.

    `base`: where the base of a checkpoint's adapters is now, if not where the run had it. Raises: as hf.load and
    whole_parameters. Costs: a checkpoint's weights are read twice, once for their checksums.
    """
    if not _is_trained(source):
        return hf.load(source, dtype=dtype, device=device)
    manifest = open_checkpoint(source)
    verify_weights(manifest)
    config = ModelConfig.load(manifest.folder)
    return hf.build(config, whole_parameters(manifest, config, base), dtype=dtype, device=device)


def stop_ids(folder: Path, template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Where an answer of the model in `folder` ends, in servers too: at the template's end of turn, and at the ids at
    which its base stops. Raises: ConfigError for a damaged generation_config.json."""
    return tokenizer.special_tokens[template.eot], *eos_ids_of(folder)


def holds_adapters(manifest: Manifest) -> bool:
    """Whether a checkpoint holds adapters instead of a whole model."""
    return BASE in manifest.identity


def whole_parameters(
    manifest: Manifest, model: ModelConfig, base: str = "", kind: str = KINDS[0]
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, one at a time, from the checkpoint's files of this kind; adapters are
    merged into their base, which is read from `base` or from where the run had it.

    Raises: CheckpointError for another base; ConfigError where none is there.
    """
    if not holds_adapters(manifest):
        return iterate_parameters(manifest, kind)
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
    adapter = dict(iterate_parameters(manifest, kind))
    return peft.merged_parameters(hf.open_tensors(folder, model), model, adapter_config, adapter)


def _is_trained(source: Path) -> bool:
    return (source / layout.MANIFEST).is_file() or bool(layout.checkpoint_folders(source))
