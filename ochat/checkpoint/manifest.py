"""`manifest.json` of a checkpoint: what it holds, in which file each row is, and the checksum of every file.

    manifest = Manifest.read(Path("runs/a/checkpoints/step_20"));  manifest.check_sizes();  manifest.checksums()

parameters  name -> {shape, dtype}                         of the whole tensor
shards      per shard: name -> [first row, end]            a shard holds rows of each parameter
files       name -> {bytes, sha256}                        weights-..., optimizer-..., config, tokenizer
step, skipped, identity, processes; sha256 of all the rest, by which a damaged manifest is recognised
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from ochat.errors import CheckpointError
from ochat.files import atomic, bounded_json
from ochat.run.layout import MANIFEST

FORMAT = 2
KINDS = ("weights", "optimizer")  # a shard's two files: only the first is read for an export
MOMENTS = ("exp_avg", "exp_avg_sq")
BASE = "base"  # the key of a run's identity that a run of adapters has

Rows = tuple[int, int]  # first and end of a range of rows


class Parameter(TypedDict):
    """A whole tensor."""

    shape: Annotated[list[int], Meta(min_length=1)]
    dtype: str


class File(TypedDict):
    """What a file must be."""

    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """The description of one complete checkpoint folder."""

    folder: Path
    step: int
    identity: dict[str, Any]
    processes: int  # that trained
    parameters: dict[str, Parameter]
    shards: Annotated[list[dict[str, Rows]], Meta(min_length=1)]
    files: dict[str, File]
    skipped: Annotated[int, Meta(ge=0)] = 0  # non-finite steps among `step`, which were not applied

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises: CheckpointError for a manifest that is missing, damaged, of another format, or that does not place
        every row of every parameter exactly once."""
        path = folder / MANIFEST
        try:
            record = bounded_json.read_object(path, CheckpointError, "take another checkpoint")
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}, so no complete checkpoint; take another one") from None
        if record.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {record.get('format')!r:.40}; this ochat reads format {FORMAT}")
        if record.pop("sha256", None) != digest(record):
            raise CheckpointError(f"{path}: damaged (its checksum differs); take another checkpoint")
        try:
            manifest = msgspec.convert(record | {"folder": folder}, cls)
            manifest._check()
        except (msgspec.ValidationError, ValueError) as error:
            raise CheckpointError(f"{path}: not a checkpoint's manifest ({error}); take another one") from None
        return manifest

    def write(self) -> None:
        """Writes `manifest.json` into the folder and waits until it is on the disk."""
        record = {"format": FORMAT} | msgspec.structs.asdict(self)
        del record["folder"]
        record["sha256"] = digest(record)
        atomic.write_json(self.folder / MANIFEST, record, indent=1)

    def check_sizes(self) -> None:
        """Raises: CheckpointError naming the first file that is missing or has another size. Reads no content."""
        for name, described in self.files.items():
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; copy the whole checkpoint, or take another one")
            if (size := path.stat().st_size) != described["bytes"]:
                raise CheckpointError(
                    f"{path}: {size} bytes instead of {described['bytes']}; copy it again, or take another checkpoint"
                )

    def checksums(self) -> dict[Path, str]:
        """The sha256 of every file."""
        return {self.folder / name: described["sha256"] for name, described in self.files.items()}

    def _check(self) -> None:
        """Raises unless file names stay in the folder, every shard has its files, and shards tile each parameter."""
        if self.skipped > self.step:
            raise ValueError(f"{self.skipped} of {self.step} steps cannot have been skipped")
        if bad := [name for name in self.files if not atomic.is_file_name(name)]:
            raise ValueError(f"{bad[0]!r} is no file of a checkpoint")
        count = len(self.shards)
        if lost := {shard_file(kind, i, count) for kind in KINDS for i in range(count)} - self.files.keys():
            raise ValueError(f"{min(lost)} is not listed")
        for name, described in self.parameters.items():
            end = 0
            for start, stop in sorted(shard[name] for shard in self.shards if name in shard):
                if start != end or stop <= start:
                    raise ValueError(f"the rows of {name} do not follow each other")
                end = stop
            if end != described["shape"][0]:
                raise ValueError(f"{name} ends at row {end} of {described['shape'][0]}")


def shard_file(kind: str, shard: int, num_shards: int) -> str:
    """weights-00001-of-00002.safetensors for shard 0 of 2."""
    return f"{kind}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def damaged(path: Path) -> str:
    """The message about a file whose content is not what was written."""
    return f"{path}: damaged (its checksum differs); copy it again, or take another checkpoint"


def copy_serving_files(source: Path, target: Path) -> None:
    """Copies a run's serving files from their folder, or from a checkpoint, without a checkpoint's other files."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(("weights-", "optimizer-", "config.", "manifest.", ".")):
            shutil.copyfile(file, target / file.name)


def digest(record: dict[str, Any]) -> str:
    """The sha256 of a record, which manifest.json holds as well."""
    content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(content).hexdigest()
