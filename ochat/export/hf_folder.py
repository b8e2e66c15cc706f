"""Write a run's weights as a Hugging Face folder that any server loads, or its adapters as PEFT's files.

    step = export(Path("runs/a"), Path("exported/a"))
A checkpoint holds all that is needed; neither base nor data has to exist any more. A checkpoint of adapters needs its
base, into which model/peft.py (`merged_parameters`) merges them, unless they are exported alone.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

from ochat.checkpoint.load import iterate_parameters, open_checkpoint
from ochat.checkpoint.manifest import EMA, KINDS, copy_serving_files, verify_weights
from ochat.errors import ConfigError
from ochat.export import serving
from ochat.export.open_model import holds_adapters, whole_parameters
from ochat.export.serving import Boundary
from ochat.files import atomic, checksums
from ochat.model import hf, peft
from ochat.model.config import ModelConfig
from ochat.text.openchat_json import OPENCHAT

log = logging.getLogger(__name__)


def export(
    source: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    base: str = "",
    condition: str | None = None,
    adapter: bool = False,
    ema: bool = False,
    boundary: Boundary = "auto",
) -> int:
    """Writes `output` from a run folder (its newest checkpoint) or a checkpoint folder; returns the step. Needs no GPU.

    `condition`: the class that the chat template takes where none is named; None: the expert's, as the run had it.
    `boundary`: whether there is one between prefix and content where a server could merge them (serving.py).
    Adapters are merged into their base, read from `base` or from where the run had it; with `adapter` they are written
    alone, as PEFT loads them. `ema`: the weights' moving average in place of the weights. Raises: CheckpointError where
    there is no checkpoint, a damaged one (the files that are read are checked) or another base; ConfigError where
    `output` is in the way, the base is gone, no prefix carries the condition, or there is no adapter or no average.
    Costs: reads the weights twice, and what was written once, for
    SHA256SUMS; holds one file of the output, of at most 5 GB, and one tensor.
    """
    manifest = open_checkpoint(source)
    if adapter and not holds_adapters(manifest):
        raise ConfigError(f"{manifest.folder}: has no adapter, all weights were trained; export it without --adapter")
    if ema and not manifest.ema:
        raise ConfigError(
            f"{manifest.folder}: has no average of weights; train with optim.ema = 0.999, or export it without --ema"
        )
    _refuse_overwriting(output, overwrite)
    kind = EMA if ema else KINDS[0]
    verify_weights(manifest, kind)
    model = ModelConfig.load(manifest.folder)
    with atomic.staging_dir(output) as folder:
        copy_serving_files(manifest.folder, folder)
        described = json.loads((manifest.folder / OPENCHAT).read_text(encoding="utf-8"))
        averaged = {"ema": manifest.ema} if ema else {}
        atomic.write_json(folder / OPENCHAT, described | {"step": manifest.step} | averaged)
        has_boundary = serving.keeps_boundary(model.model_type, boundary)
        if serving.adapt(folder, condition=condition, boundary=has_boundary):
            reason = (
                "" if boundary == "never" else f": transformers and vLLM take it for text in {model.model_type} models"
            )
            log.info("%s has no boundary between prefix and message%s", output, reason)
        if adapter:
            peft.save(folder, model, _adapter_config(manifest.folder, base), dict(iterate_parameters(manifest, kind)))
        else:
            (folder / peft.CONFIG).unlink(missing_ok=True)  # a loader would look for the adapter's weights
            hf.save(folder, model, whole_parameters(manifest, model, base, kind), dtype)
        checksums.write(folder)
        atomic.remove(output)
        os.rename(folder, output)
    return manifest.step


def _adapter_config(folder: Path, base: str) -> peft.AdapterConfig:
    """The adapter's, with `base`, if given, as its base. Raises: ConfigError for a base in which PEFT would not find
    the adapted modules: it passes over them without an error."""
    found = peft.AdapterConfig.read(folder)
    found = replace(found, base=base or found.base)
    if hf.is_multimodal(found.base):
        raise ConfigError(
            f"{found.base}: a multimodal model; the adapter is of its text model. Make that with "
            f"`ochat init-base --hf {found.base} NEW_DIR` and export with --base NEW_DIR, or without --adapter"
        )
    return found


def _refuse_overwriting(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{output}: exists; add --overwrite to replace it")
    if not (output / OPENCHAT).is_file():
        raise ConfigError(f"{output}: is not an exported model, and is left alone")
