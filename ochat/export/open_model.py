"""Open a model to evaluate: an exported folder, a run's newest checkpoint, or a checkpoint.

model = open_model(Path("runs/mine"), dtype="bfloat16", device="cpu");  tokenizer.load(folder_of(Path("runs/mine")))
"""

from __future__ import annotations

from pathlib import Path

import ochat_kernels
import torch

from ochat.export import hf_folder
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import torch_dtype
from ochat.model.transformer import Transformer
from ochat.run import layout
from ochat.run.layout import MANIFEST
from ochat.text.openchat_json import read_description


def folder_of(source: Path) -> Path:
    """The folder with tokenizer and openchat.json: the newest checkpoint of a run, else `source` itself.

    Raises: ConfigError where there is no folder; CheckpointError for an incomplete checkpoint.
    """
    read_description(source)
    return hf_folder.find(source).folder if _is_trained(source) else source


def open_model(source: Path, *, dtype: str, device: str, base: str = "") -> Transformer:
    """The whole model, on the reference kernels.

    `base`: the folder of a checkpoint's adapters' base, if it has moved since the run. Raises: as hf.load and
    export. Costs: a checkpoint's weights are read twice, once for their checksums.
    """
    if not _is_trained(source):
        return hf.load(source, dtype=dtype, device=device)
    manifest = hf_folder.find(source)
    hf_folder.check_weights(manifest)
    config = ModelConfig.load(manifest.folder)
    with torch.device("meta"):
        model = Transformer(config, ochat_kernels.load("reference"))
    model.to(torch_dtype(dtype)).to_empty(device=device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in hf_folder.whole_parameters(manifest, config, base):
            parameters[name].copy_(value)
    return model


def _is_trained(source: Path) -> bool:
    return (source / MANIFEST).is_file() or bool(layout.checkpoint_folders(source))
