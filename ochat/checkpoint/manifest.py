"""`manifest.json` of a checkpoint: what it holds, in which file each row is, and the checksum of every file.

    manifest = Manifest.read(Path("runs/a/checkpoints/step_20"));  manifest.check_sizes();  manifest.checksums()
    manifest = verify_checkpoint(Path("runs/a/checkpoints/step_20"), ranks)   # each file is read by one of the ranks

parameters  name -> {shape, dtype}                         of the whole tensor
shards      per shard: name -> [first row, end]            a shard holds rows of each parameter
files       name -> {bytes, sha256}                        weights-..., optimizer-..., ema-..., config, tokenizer
step, skipped, ema, identity, processes; sha256 of all the rest, by which a damaged manifest is recognised
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, OchatError, message
from ochat.files import atomic, bounded_json, checksums
from ochat.run.layout import MANIFEST

log = logging.getLogger(__name__)

FORMAT = 2
QUIET_BYTES = 2e9  # reading more is announced: it takes seconds
KINDS = ("weights", "optimizer")  # a shard's two files: only the first is read for an export
EMA = "ema"  # a third, with optim.ema: the moving average of the weights, which `ochat export --ema` reads instead
MOMENTS = ("exp_avg", "exp_avg_sq")
LAST_CONDITIONED = "last step with conditions"  # the key of a run with a cooldown (condition.last)
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
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # optim.ema; 0: there is no average

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of a shard's files."""
        return (*KINDS, EMA) if self.ema else KINDS

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
        if lost := {shard_file(kind, i, count) for kind in self.kinds for i in range(count)} - self.files.keys():
            raise ValueError(f"{min(lost)} is not listed")
        for name, described in self.parameters.items():
            rows = sorted(shard[name] for shard in self.shards if name in shard)
            ends = [0, *(end for _, end in rows)]
            if [first for first, _ in rows] != ends[:-1] or ends != sorted(set(ends)):
                raise ValueError(f"the rows of {name} do not follow each other")
            if ends[-1] != described["shape"][0]:
                raise ValueError(f"{name} ends at row {ends[-1]} of {described['shape'][0]}")


def shard_file(kind: str, shard: int, num_shards: int) -> str:
    """weights-00001-of-00002.safetensors for shard 0 of 2."""
    return f"{kind}-{shard + 1:05d}-of-{num_shards:05d}.safetensors"


def verify_checkpoint(folder: Path, ranks: Ranks) -> Manifest:
    """The manifest of a folder whose files all have their sizes and checksums. Every rank calls it.

    Raises: CheckpointError naming the file, the same on all ranks. Costs: every file is read once by one of the ranks,
    about 1 s a GB.
    """
    found: list[Manifest] = []

    def list_files() -> dict[Path, str]:
        found.append(Manifest.read(folder))
        found[0].check_sizes()
        return found[0].checksums()

    verify_files(list_files, damaged, CheckpointError, ranks, f"{folder} with its checksums")
    return found[0]


def verify_weights(manifest: Manifest, kind: str = KINDS[0]) -> None:
    """Raises: CheckpointError naming a damaged file; a shard's files of other kinds are not read. Costs: reads the
    others once."""
    unread = tuple(f"{each}-" for each in (*KINDS, EMA) if each != kind)
    files = {path: sha for path, sha in manifest.checksums().items() if not path.name.startswith(unread)}
    if path := checksums.first_changed(files):
        raise CheckpointError(damaged(path))


def verify_files(
    list_files: Callable[[], dict[Path, str]],
    damaged: Callable[[Path], str],
    error: type[OchatError],
    ranks: Ranks,
    what: str,
) -> int:
    """Compares files with their sha256 and returns their number. Every rank calls it and reads its share of them.

    `damaged`: the message about a file; `what`: what is read, for a note where it is large. Raises: `error` on all
    ranks with the first rank's problem.
    """
    problem, files = "", {}
    try:
        files = list_files()
        largest_first = sorted(files, key=lambda path: (-path.stat().st_size, path))
        if (num_bytes := sum(path.stat().st_size for path in files)) > QUIET_BYTES:
            log.info("comparing %.1f GB of %s", num_bytes / 1e9, what)
        changed = checksums.first_changed({path: files[path] for path in largest_first[ranks.rank :: ranks.world]})
        problem = damaged(changed) if changed else ""
    except (OchatError, OSError) as caught:
        problem = message(caught)
    ranks.raise_on_all_ranks(problem, error)
    return len(files)


def damaged(path: Path) -> str:
    """The message about a file whose content is not what was written."""
    return f"{path}: damaged (its checksum differs); copy it again, or take another checkpoint"


def copy_serving_files(source: Path, target: Path) -> None:
    """Copies a run's serving files from their folder, or from a checkpoint, without a checkpoint's other files."""
    others = *(f"{kind}-" for kind in (*KINDS, EMA)), "config.", "manifest.", "."
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(others):
            shutil.copyfile(file, target / file.name)


def digest(record: dict[str, Any]) -> str:
    """The sha256 of a record, which manifest.json holds as well."""
    content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(content).hexdigest()
