"""Checkpoints: finding the newest whole one, checking it, and reading from it just the rows that a rank holds.

    RUN/checkpoints/step_N/   manifest.json, weights-... and optimizer-... of every shard, config.json, serving files
    RUN/latest                one line that names the newest: checkpoints/step_N

    found = checkpoint.find(run_dir, "auto", ranks, print);  step = checkpoint.load(found, model, optimizer)
The saver writes them. They hold the weights that are updated and AdamW's moments, in their dtypes, under our names, in
safetensors and JSON only; `ochat export` makes a Hugging Face folder of any of them. The step number alone decides the
data that follows, and how bf16 is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ochat.checkpoint import manifest as manifest_module
from ochat.checkpoint.manifest import Manifest
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError
from ochat.files.safetensors_file import SafetensorsFile
from ochat.model import hf
from ochat.model.transformer import Transformer
from ochat.run.layout import CHECKPOINTS, MANIFEST, checkpoint_folders, step_of

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def find(run_dir: Path, resume: str, ranks: Ranks, say: Callable[[str], None]) -> Manifest | None:
    """The checkpoint that `run.resume` names, checked: "auto" is the newest whole one, or None where there is none
    at all; "never" is None. Every rank calls it and all get the same answer.

    `say` hears which ones were skipped, and why. Raises: CheckpointError where a named one is missing or damaged, where
    all are damaged, or where the run folder holds later ones, which going on from there would leave behind as another
    branch. Costs: as verify.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return _named(run_dir, resume, ranks)
    skipped = []
    names = [folder.name for folder in reversed(checkpoint_folders(run_dir))]
    for name in ranks.all_gather_json({"names": names})[0]["names"]:
        folder = run_dir / CHECKPOINTS / name
        try:
            return verify(folder, ranks)
        except CheckpointError as error:
            skipped.append(folder.name)
            say(f"skipping {folder.name}: {error}")
    if skipped:
        raise CheckpointError(
            f"{run_dir / CHECKPOINTS}: none of {', '.join(skipped)} can be loaded; mend one of them, or remove them to "
            "start anew from the base"
        )
    return None


def verify(folder: Path, ranks: Ranks) -> Manifest:
    """The manifest of a folder whose files all have their sizes and checksums. Every rank calls it.

    Raises: CheckpointError naming the file, on all ranks alike. Costs: every file is read once by one of the ranks,
    about 1 s a GB.
    """
    problem, manifest = "", None
    try:
        manifest = Manifest.read(folder)
        manifest.check_sizes()
        largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name]["bytes"], name))
        for name in largest_first[ranks.rank :: ranks.world]:  # an optimizer's file is twice as large as the weights'
            manifest.check_file(name)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    ranks.raise_on_all_ranks(problem, CheckpointError)
    assert manifest is not None
    return manifest


def check_identity(manifest: Manifest, now: dict[str, Any]) -> None:
    """Raises: CheckpointError naming what a checkpoint of another model, template, data set or order of the data has
    otherwise."""
    saved = manifest.identity
    differ = [
        f"{key} is {saved.get(key)!r} there and {value!r} here" for key, value in now.items() if saved.get(key) != value
    ]
    if differ:
        raise CheckpointError(
            f"{manifest.folder}: belongs to another run: {'; '.join(differ)}. Continue with the configuration it was "
            "made with, start anew in another --run.dir, or go on all the same with --run.resume_mismatched=true"
        )


def load(manifest: Manifest, model: nn.Module, optimizer: Any) -> int:
    """Fill the model and the optimizer, whose state exists (optim.start_state), from a checkpoint made on any number of
    processes; return its step.

    Moments that were saved in another dtype are rounded to nearest, once. Raises: CheckpointError for a model of other
    shapes or dtypes. Costs: reads the rows that this rank holds, once.
    """
    _check_shapes(manifest, model)
    shards = Shards(manifest)
    for name, parameter in local_shards.trainable_parameters(model).items():
        state = {moment: optimizer.state[parameter][moment] for moment in manifest_module.MOMENTS}
        for stored, target in slices(name, parameter, state).items():
            _fill(target, shards.read(*stored, *local_shards.row_range(parameter)))
    return manifest.step


def load_base(folder: Path, model: Transformer) -> None:
    """Fills the model's parameters, adapters apart, from a Hugging Face folder; a sharded one reads the rows that
    this rank holds, and of the rest the files' headers.

    Raises: as hf.open_tensors; CheckpointError for a stored head that differs from the embedding it should be.
    """
    files, known = hf.open_tensors(folder, model.config), hf.parameter_parts(model.config)
    for name, parameter in ((name, p) for name, p in model.named_parameters() if name in known):
        _fill(
            local_shards.local_shard(parameter),
            hf.read_rows(files, model.config, name, *local_shards.row_range(parameter)),
        )


def iterate_parameters(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, in the dtype it was trained in, read one at a time; the optimizer's files
    are left alone."""
    shards = Shards(manifest)
    for name, described in manifest.parameters.items():
        pieces = [piece for _, piece in shards.read("weights", name, name, 0, described["shape"][0])]
        yield name, torch.cat(pieces)


def slices(name: str, parameter: Tensor, state: dict[str, Tensor]) -> dict[tuple[str, str, str], Tensor]:
    """(kind of file, tensor's name there, parameter's name) -> this rank's part of a parameter and of its moments."""
    moments = {
        ("optimizer", f"{moment}.{name}", name): local_shards.local_shard(state[moment])
        for moment in manifest_module.MOMENTS
    }
    return {("weights", name, name): local_shards.local_shard(parameter)} | moments


class Shards:
    """The shard files of a checkpoint, each opened when the first of its rows is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: dict[str, SafetensorsFile] = {}

    def read(self, kind: str, stored: str, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(offset from `start`, CPU tensor) of the pieces that make rows of parameter `name`, from the tensor `stored`
        of each shard's file of that kind; mapped, not read.

        Raises: CheckpointError naming a file that does not hold it.
        """
        for shard, held in enumerate(self.manifest.shards):
            first, end = held.get(name, (0, 0))
            low, high = max(start, first), min(stop, end)
            if low < high:
                yield low - start, self._read(self.manifest.shard_file(kind, shard), stored, low - first, high - first)

    def _read(self, name: str, stored: str, start: int, stop: int) -> Tensor:
        if name not in self._files:
            self._files[name] = SafetensorsFile(self.manifest.folder / name, CheckpointError, "take another checkpoint")
        return self._files[name].rows(stored, start, stop)


def _named(run_dir: Path, resume: str, ranks: Ranks) -> Manifest:
    if not Path(resume).is_dir():
        raise CheckpointError(f"run.resume = {resume!r}: no such folder; give a checkpoint's, a step_N with {MANIFEST}")
    found, there = verify(Path(resume), ranks), checkpoint_folders(run_dir)
    if there and step_of(there[-1]) > found.step:
        raise CheckpointError(
            f"run.resume = {resume!r}: {run_dir} holds the later {there[-1].name}; go on in another --run.dir, "
            "or remove the later checkpoints"
        )
    return found


@torch.no_grad()
def _fill(target: Tensor, pieces: Iterator[tuple[int, Tensor]]) -> None:
    for offset, piece in pieces:
        target[offset : offset + piece.shape[0]].copy_(piece)


def _check_shapes(manifest: Manifest, model: nn.Module) -> None:
    here = {
        name: f"{dtype_name(tensor)} {list(tensor.shape)}"
        for name, tensor in local_shards.trainable_parameters(model).items()
    }
    there = {name: f"{described['dtype']} {described['shape']}" for name, described in manifest.parameters.items()}
    for name in sorted(here.keys() | there.keys()):
        saved, wanted = (found.get(name, "missing") for found in (there, here))
        if saved != wanted:
            raise CheckpointError(
                f"{manifest.folder}: {name} is {saved} there and {wanted} in this model; a checkpoint only fits the "
                "model and the optim.master_dtype it was made of"
            )


def dtype_name(tensor: Tensor) -> str:
    """float32, bfloat16 or float16, as a manifest says it."""
    return DTYPE_NAMES[tensor.dtype]
