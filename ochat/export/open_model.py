"""Open any model folder: an exported or Hugging Face folder, a checkpoint, or a run (its newest checkpoint).

model = open_model(Path("runs/mine"), dtype="bfloat16", device="cpu")
tokenizer.load(folder_of(Path("runs/mine")))
"""

from __future__ import annotations

from pathlib import Path

from ochat.checkpoint.load import open_checkpoint
from ochat.checkpoint.verify import verify_weights
from ochat.export.merge import whole_parameters
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.run import layout
from ochat.text.openchat_json import read_description


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


def _is_trained(source: Path) -> bool:
    return (source / layout.MANIFEST).is_file() or bool(layout.checkpoint_folders(source))
