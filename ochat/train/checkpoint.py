"""Checkpoints: `RUN/checkpoints/step_N/` holds the fp32 masters as a Hugging Face folder, AdamW's moments and one JSON.

    state = checkpoint.save(run_dir, step, model, optimizer, identity, ranks)
    step  = checkpoint.load(path, model, optimizer, identity)

The first rank writes into a temporary folder, syncs it to the disk and renames it; a folder named step_N is complete.
Only safetensors and JSON are read or written. The step number alone decides the data that follows.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ochat.errors import CheckpointError
from ochat.model import hf, safetensor_files
from ochat.model.transformer import Transformer
from ochat.train import optim, parallel, serving
from ochat.train.parallel import Ranks

FORMAT = 1
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
SERVING = "serving"  # the run's folder of tokenizer, chat template and openchat.json


def save(
    run_dir: Path,
    step: int,
    model: Transformer,
    optimizer: Any,
    identity: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int,
) -> Path:
    """Writes `checkpoints/step_{step}` with a copy of the run's serving files, then drops all but the newest `keep`.

    Every rank calls it, the first one writes; its host memory must hold the weights' shard and both moments.
    """
    root = run_dir / "checkpoints"
    final, temporary = root / f"step_{step}", root / f".step_{step}.tmp"
    weights = ((name, parallel.gather(p)) for name, p in model.named_parameters())
    moments = ((f"{moment}.{name}", parallel.gather(t)) for name, moment, t in optim.moments(model, optimizer))
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        hf.save(temporary, model.config, weights, torch.float32)
        safetensor_files.write_file(temporary / OPTIMIZER, dict(moments))
        serving.copy(run_dir / SERVING, temporary)
        state = {"format": FORMAT, "step": step, "identity": identity}
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        _publish(temporary, final)
        _drop_old(root, keep)
    else:  # gathering takes every rank
        for _ in itertools.chain(weights, moments):
            pass
    ranks.barrier()
    return final


def load(path: Path, model: Transformer, optimizer: Any, identity: dict[str, Any]) -> int:
    """Fills model and optimizer from a checkpoint folder and returns its step.

    Raises: CheckpointError for a missing or damaged file, or a checkpoint of another model, template, data set or order
    of the data.
    """
    state = read_state(path)
    _check_identity(path, state["identity"], identity)
    load_weights(path, model)
    optim.start_state(optimizer, state["step"])
    try:
        with safe_open(path / OPTIMIZER, framework="pt") as file:
            for name, moment, target in optim.moments(model, optimizer):
                parallel.fill(target, file.get_tensor(f"{moment}.{name}"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / OPTIMIZER}: {error}") from None
    return state["step"]


def load_weights(folder: Path, model: Transformer) -> None:
    """Fills the model's parameters, sharded or not, from a Hugging Face folder, one tensor at a time."""
    parameters = dict(model.named_parameters())
    for name, tensor in hf.iterate_parameters(folder, model.config):
        parallel.fill(parameters[name], tensor)


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's JSON: format, step, identity."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE}: not a readable checkpoint: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path / STATE}: format {state.get('format') if isinstance(state, dict) else None!r}, expected {FORMAT}"
        )
    return state


def complete(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name[5:].isdigit() and (p / STATE).is_file()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def find(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that `run.resume` names: "auto" is the newest complete one or None, "never" is None.

    Raises: CheckpointError where there is none at a named place, or the run folder holds later ones, which going on
    from there would leave behind as another branch.
    """
    there = complete(run_dir)
    if resume == "never":
        return None
    if resume == "auto":
        return there[-1] if there else None
    if not (Path(resume) / STATE).is_file():
        raise CheckpointError(f"run.resume = {resume!r}: no checkpoint there (a folder step_N with {STATE})")
    if there and read_state(there[-1])["step"] > read_state(Path(resume))["step"]:
        raise CheckpointError(
            f"run.resume = {resume!r}: {run_dir} holds the later {there[-1].name}; go on in another --run.dir, "
            "or remove the later checkpoints"
        )
    return Path(resume)


def _check_identity(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    differ = [
        f"{key} is {saved.get(key)!r} there and {value!r} here" for key, value in now.items() if saved.get(key) != value
    ]
    if differ:
        raise CheckpointError(
            f"{path}: belongs to another run: {'; '.join(differ)}. Continue with the configuration it was made with, "
            "or start anew in another --run.dir"
        )


def _publish(temporary: Path, final: Path) -> None:
    for file in [*temporary.iterdir(), temporary]:
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_old(root: Path, keep: int) -> None:
    if keep:
        for old in complete(root.parent)[:-keep]:
            shutil.rmtree(old)
