"""Find the checkpoint to resume from, and read from it the rows that a rank holds.

    RUN/checkpoints/step_N/   manifest.json, weights-... and optimizer-... of every shard, config.json, serving files
    RUN/latest                one line that names the newest, for people: resuming goes by the folders

    found = find_checkpoint(run_dir, "auto", ranks);  load_state(found, model, optimizer.state)
A checkpoint holds the updated weights and AdamW's moments, in their dtypes, under our names, as safetensors and JSON
(and with optim.ema the weights' average);
`ochat export` makes a Hugging Face folder of any of them. The step number alone decides the data that follows and how
bf16 is rounded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ochat.checkpoint.manifest import EMA, KINDS, LAST_CONDITIONED, MOMENTS, Manifest, shard_file, verify_checkpoint
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError
from ochat.files.safetensors_file import open_file
from ochat.model import hf
from ochat.model.transformer import Transformer
from ochat.run.layout import CHECKPOINTS, MANIFEST, checkpoint_folders, step_of

log = logging.getLogger(__name__)
ADVICE = "take another checkpoint"


def find_checkpoint(run_dir: Path, resume: str, ranks: Ranks) -> Manifest | None:
    """The verified checkpoint that `run.resume` names: "auto" is the newest complete one, or None where there is none;
    "never" is None. Every rank calls it and all get the same answer.

    Raises: CheckpointError where a named one is missing or damaged, where all are damaged, or where the run folder
    holds later ones, which resuming from it would turn into another branch. Costs: as verify_checkpoint.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named(run_dir, resume, ranks)
    skipped = []
    names = [folder.name for folder in reversed(checkpoint_folders(run_dir))]
    names = ranks.all_gather_json({"names": names})[0]["names"]  # a shared disk may show other ranks new ones late
    for name in names:
        try:
            return verify_checkpoint(run_dir / CHECKPOINTS / name, ranks)
        except CheckpointError as error:
            skipped.append(name)
            log.warning("skipping %s: %s", name, error)
    if skipped:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: none of {', '.join(skipped)} can be loaded; fix one, or delete them all to "
            "restart from the base model"
        )
    return None


def open_checkpoint(source: Path) -> Manifest:
    """The checkpoint that `source` is, or the newest of the run folder that it is, its files' sizes checked."""
    there = [source] if (source / MANIFEST).is_file() else checkpoint_folders(source)
    if not there:
        raise CheckpointError(f"{source}: neither a checkpoint nor a run folder with a checkpoint")
    manifest = Manifest.read(there[-1])
    manifest.check_sizes()
    return manifest


def check_identity(manifest: Manifest, identity: dict[str, Any]) -> None:
    """Raises: CheckpointError naming what differs: model, template, data set or order of the data."""
    pairs = {key: (manifest.identity.get(key), identity.get(key)) for key in {**identity, **manifest.identity}}
    differ = [
        f"{key} is {_shown(there)} there and {_shown(here)} here"
        for key, (there, here) in pairs.items()
        if there != here and not (key == LAST_CONDITIONED and _is_to_come(manifest.step, there, here))
    ]
    if differ:
        raise CheckpointError(
            f"{manifest.folder}: belongs to another run: {'; '.join(differ)}. Continue with the configuration it was "
            "made with, start again in another --run.dir, or resume all the same with --run.resume_mismatched=true"
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)


def _is_to_come(step: int, *last: Any) -> bool:
    """Whether no cooldown that begins behind these steps (None: never) has begun after `step`: it may still change."""
    return all(each is None or (isinstance(each, int) and step <= each) for each in last)


def load_state(
    manifest: Manifest,
    model: nn.Module,
    state: Mapping[Tensor, Mapping[str, Tensor]],
    average: Mapping[Tensor, Tensor] | None = None,
) -> None:
    """Fills the model, its optimizer's moments and the average of its weights from a checkpoint made on any number of
    processes.

    `state`: of each parameter, as optimizer.state has it. `average`: this rank's rows of each parameter's; left alone
    where the checkpoint has none. Moments that were saved in another dtype are rounded to
    nearest, once. Raises: CheckpointError for a model of other shapes or dtypes. Costs: reads the rows that this rank
    holds, once.
    """
    _check_shapes(manifest, model)
    shards, averages = ShardReader(manifest), average if average and manifest.ema else {}
    for name, parameter in local_shards.trainable_parameters(model).items():
        targets = stored_tensors(name, parameter, state[parameter], averages.get(parameter))
        for (kind, stored), target in targets.items():
            _fill(target, shards.read(kind, stored, name, *local_shards.row_range(parameter)))


def load_base(folder: Path, model: Transformer) -> None:
    """Fills the model's parameters, except adapters, from a Hugging Face folder; a sharded one reads the rows that
    this rank holds, and of the rest the files' headers. Of a weight in NF4 every rank reads and quantises all, one
    linear of the folder at a time, and keeps its share, so that the values do not depend on the number of ranks.

    Raises: as hf.open_tensors; CheckpointError for a stored head that differs from the embedding it should be.
    """
    stored, known = hf.open_tensors(folder, model.config), hf.parameter_parts(model.config)
    for name, parameter in ((name, p) for name, p in model.named_parameters() if name in known):
        target, place = local_shards.local_shard(parameter), local_shards.row_range(parameter)
        module, _, kind = name.rpartition(".")
        packing = getattr(model.get_submodule(module), "nf4", None) if kind == "weight" else None
        if packing is None:
            pieces = hf.read_rows(stored, model.config, name, *place)
        else:
            parts = (part for _, part in hf.read_rows(stored, model.config, name, 0, sum(packing.rows)))
            pieces = _within(packing.quantize(parts, target.dtype, target.device), *place)
        _fill(target, pieces)


def iterate_parameters(manifest: Manifest, kind: str = KINDS[0]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, in the dtype it was trained in, or of its average (`kind` EMA), in fp32;
    read one at a time, from the files of this kind alone."""
    shards = ShardReader(manifest)
    for name, described in manifest.parameters.items():
        pieces = [piece for _, piece in shards.read(kind, name, name, 0, described["shape"][0])]
        yield name, torch.cat(pieces)


def stored_tensors(
    name: str, parameter: Tensor, state: Mapping[str, Tensor], average: Tensor | None = None
) -> dict[tuple[str, str], Tensor]:
    """(kind of file, name in it) -> this rank's part of a parameter, of its moments and of its average, if it has
    one."""
    moments = {("optimizer", f"{moment}.{name}"): local_shards.local_shard(state[moment]) for moment in MOMENTS}
    averages = {} if average is None else {(EMA, name): average}
    return {("weights", name): local_shards.local_shard(parameter)} | moments | averages


def dtype_name(tensor: Tensor) -> str:
    """float32, bfloat16 or float16, as a manifest says it."""
    return str(tensor.dtype).removeprefix("torch.")


class ShardReader:
    """Reads rows of a checkpoint; a file is opened when the first of its rows is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._open = cache(lambda path: open_file(path, CheckpointError, ADVICE))

    def read(self, kind: str, stored: str, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(offset from `start`, CPU tensor) of the pieces that make rows of parameter `name`, from the tensor `stored`
        of each shard's file of that kind; mapped, not read.

        Raises: CheckpointError naming a file that does not hold it.
        """
        for shard, held in enumerate(self.manifest.shards):
            first, end = held.get(name, (0, 0))
            low, high = max(start, first), min(stop, end)
            if low < high:
                path = self.manifest.folder / shard_file(kind, shard, len(self.manifest.shards))
                if stored not in self._open(path):
                    raise CheckpointError(f"{path}: does not hold {stored}; {ADVICE}")
                yield low - start, self._open(path)[stored].rows(low - first, high - first)


def _named(run_dir: Path, resume: str, ranks: Ranks) -> Manifest:
    if not Path(resume).is_dir():
        raise CheckpointError(f"run.resume = {resume!r}: no such folder; give a checkpoint's, a step_N with {MANIFEST}")
    found, there = verify_checkpoint(Path(resume), ranks), checkpoint_folders(run_dir)
    if there and step_of(there[-1]) > found.step:
        raise CheckpointError(
            f"run.resume = {resume!r}: {run_dir} holds the later {there[-1].name}; resume in another --run.dir, "
            "or remove the later checkpoints"
        )
    return found


@torch.no_grad()
def _fill(target: Tensor, pieces: Iterator[tuple[int, Tensor]]) -> None:
    for offset, piece in pieces:
        target[offset : offset + piece.shape[0]].copy_(piece)


def _within(pieces: Iterator[tuple[int, Tensor]], start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """What rows from `start` to `stop` have of the pieces, with offsets from `start`."""
    for first, piece in pieces:
        low, high = max(start, first), min(stop, first + piece.shape[0])
        if low < high:
            yield low - start, piece[low - first : high - first]


def _check_shapes(manifest: Manifest, model: nn.Module) -> None:
    parameters = local_shards.trainable_parameters(model)
    here = {name: f"{dtype_name(tensor)} {list(tensor.shape)}" for name, tensor in parameters.items()}
    there = {name: f"{described['dtype']} {described['shape']}" for name, described in manifest.parameters.items()}
    for name in sorted(here.keys() | there.keys()):
        saved, wanted = (found.get(name, "missing") for found in (there, here))
        if saved != wanted:
            raise CheckpointError(
                f"{manifest.folder}: {name} is {saved} there and {wanted} in this model; a checkpoint only fits the "
                "model and the optim.master_dtype it was made of"
            )
