"""The prepared data set on disk: safetensors shards and the manifest that describes them.

A shard holds, for its S sequences with T tokens and N spans (a span is a stretch of one role and one weight):

    input_ids    (T,)   uint16 or uint32     offsets      (S+1,) int64
    span_offsets (S+1,) int64                span_ends    (N,)   int32, exclusive, within the sequence
    span_roles   (N,)   uint8                span_weights (N,)   float32, NaN where the record gives none
    class_ids    (S,)   uint16               rewards      (S,)   float32, NaN where the record gives none
    lines        (S,)   int64                files        (S,)   uint16

Writing goes into a folder beside the destination, manifest last, and one rename: what is interrupted never loads.
A merged manifest (merge.py) names shards of other folders by their paths; each has a `part`, the place in `parts` of
the classes and files that its numbers mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ochat.data import manifest_schema
from ochat.errors import ConfigError, DataError
from ochat.files import atomic, bounded_json, checksums

FORMAT, VERSION, MERGED_VERSION = "ochat-tokens", 1, 2
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26  # 256 MiB of ids at most: what the writer holds in memory


@dataclass
class Columns:
    """Sequences of some records, in order; what a worker returns."""

    input_ids: list[NDArray[np.uint32]] = field(default_factory=list)  # per sequence
    span_ends: list[list[int]] = field(default_factory=list)
    span_roles: list[list[int]] = field(default_factory=list)
    span_weights: list[list[float]] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def arrays(self, class_ids: dict[str, int], file_ids: dict[str, int], id_dtype: type) -> dict[str, NDArray]:
        """The shard's arrays, with counts instead of offsets. New classes and files get the next numbers."""
        return {
            "input_ids": np.concatenate([np.zeros(0, id_dtype), *self.input_ids]).astype(id_dtype),
            "lengths": np.array([len(ids) for ids in self.input_ids], np.int64),
            "span_counts": np.array([len(ends) for ends in self.span_ends], np.int64),
            "span_ends": np.array([end for ends in self.span_ends for end in ends], np.int32),
            "span_roles": np.array([role for roles in self.span_roles for role in roles], np.uint8),
            "span_weights": np.array([weight for weights in self.span_weights for weight in weights], np.float32),
            "class_ids": _numbers(self.conditions, class_ids, "classes"),
            "rewards": np.array(self.rewards, np.float32),
            "lines": np.array(self.lines, np.int64),
            "files": _numbers(self.files, file_ids, "files"),
        }


def _numbers(names: list[str], known: dict[str, int], what: str) -> NDArray[np.uint16]:
    numbers = [known.setdefault(name, len(known)) for name in names]
    if len(known) > 1 << 16:
        raise DataError(f"more than {1 << 16} {what}, the last one {names[-1]!r}: a data set holds no more")
    return np.array(numbers, np.uint16)


class ShardWriter:
    """Collects columns and writes a shard whenever enough tokens have come together; `finish` writes the manifest and
    gives the folder its name. Of several sets that belong together each is sealed, then all are published.

    Use as a context manager: leaving it by an exception or a SIGTERM removes everything written so far.
    """

    def __init__(self, output: Path, vocab_size: int, *, overwrite: bool = False) -> None:
        self.output = output
        self._partial = atomic.staging_dir(output)
        self.id_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.class_ids: dict[str, int] = {}
        self.file_ids: dict[str, int] = {}
        self.shards: list[dict[str, Any]] = []
        self._parts: list[dict[str, NDArray]] = []
        self._num_tokens = 0
        _check_destination(output, overwrite)

    def __enter__(self) -> ShardWriter:
        self.folder = self._partial.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._partial.__exit__(*error)

    def add(self, columns: Columns) -> None:
        """Append sequences."""
        arrays = columns.arrays(self.class_ids, self.file_ids, self.id_dtype)
        self._parts.append(arrays)
        self._num_tokens += len(arrays["input_ids"])
        if self._num_tokens >= SHARD_TOKENS:
            self._write_shard()

    def finish(self, manifest: dict[str, Any], roles: Sequence[str]) -> None:
        """Write what is left and the manifest, then give the folder its name."""
        self.seal(manifest, roles)
        publish([self])

    def seal(self, manifest: dict[str, Any], roles: Sequence[str]) -> None:
        """Write what is left and the manifest, last."""
        if self._num_tokens:
            self._write_shard()
        described = {"format": FORMAT, "version": VERSION, **manifest, "classes": list(self.class_ids)}
        known = {shard["file"] for shard in self.shards}
        others = [_described(path) for path in sorted(self.folder.iterdir()) if path.name not in known]
        described |= {"roles": list(roles), "files": list(self.file_ids), "shards": self.shards, "others": others}
        write_manifest(self.folder / MANIFEST, described)

    def _write_shard(self) -> None:
        # a column's parts go before the next one is joined: memory holds the token ids twice, and nothing else
        joined = {name: np.concatenate([part.pop(name) for part in self._parts]) for name in list(self._parts[0])}
        self._parts, self._num_tokens = [], 0
        joined["offsets"] = _offsets(joined.pop("lengths"))
        joined["span_offsets"] = _offsets(joined.pop("span_counts"))
        path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        try:
            save_file(joined, path, metadata={"format": FORMAT})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{self.output}: cannot be written: {error}") from None
        path.chmod(self.folder.stat().st_mode & 0o666)  # the library keeps files to their owner
        atomic.fsync(path)
        sizes = {"sequences": len(joined["class_ids"]), "tokens": len(joined["input_ids"])}
        self.shards.append(_described(path) | sizes)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished data set. Raises DataError for a folder that is none, or of another version, and for a
    manifest that is not what was written."""
    path = folder / MANIFEST
    if not path.is_file():
        there = "a file, not a folder" if folder.exists() else "no such folder"
        what = f"no {MANIFEST} in it" if folder.is_dir() else there
        raise DataError(f"{folder.absolute()}: not a prepared data set ({what}): write one with ochat prepare")
    manifest = bounded_json.read_object(path, DataError, "copy it again, or prepare the data again")
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a data set (format is not {FORMAT!r})")
    if manifest.get("version") != (MERGED_VERSION if "parts" in manifest else VERSION):
        raise DataError(
            f"{path}: version {manifest.get('version')!r}, this ochat reads {VERSION} and "
            f"{MERGED_VERSION}: prepare the data again"
        )
    if manifest.get("digest") != digest(manifest):
        raise DataError(f"{path}: its content has changed since it was written: copy it again, or prepare again")
    manifest_schema.check(manifest, path)
    return manifest


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write it with its own digest, and wait until it is on the disk."""
    described = manifest | {"digest": digest(manifest)}
    atomic.write_json(path, described)


def digest(manifest: dict[str, Any]) -> str:
    """sha256 over the manifest without its own `digest`, however it is laid out."""
    kept = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def names(manifest: dict[str, Any], shard: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The classes and the input files that the numbers of one of the manifest's shards mean."""
    owner = manifest["parts"][shard["part"]] if "part" in shard else manifest
    return owner["classes"], owner["files"]


def check_size(folder: Path, shard: dict[str, Any]) -> Path:
    """The path of a shard. Raises DataError if it is missing or has another size than was written."""
    path = folder / shard["file"]
    if not path.is_file():
        raise DataError(f"{path}: missing: copy the whole data set, or prepare the data again")
    if path.stat().st_size != shard["bytes"]:
        size = path.stat().st_size
        raise DataError(f"{path}: {size} bytes instead of {shard['bytes']}: copy it again, or prepare the data again")
    return path


def _described(path: Path) -> dict[str, Any]:
    return {"file": path.name, "sha256": checksums.sha256(path), "bytes": path.stat().st_size}


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


def _check_destination(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise ConfigError(f"{output}: exists and is no data set: give another --output")
    if not overwrite:
        raise ConfigError(f"{output}: a data set is there already: give another --output, or --overwrite to replace it")


def publish(writers: Sequence[ShardWriter]) -> None:
    """Give finished sets that belong together their names, the first one last: where it is, all are, and of one run.

    A first set that was there goes before anything else does, so that a kill on the way leaves none, never a mixture.
    """
    old = {writer.output: writer.output.parent / f".{writer.output.name}.replaced-{os.getpid()}" for writer in writers}
    for output, aside in old.items():
        if output.exists():
            os.rename(output, aside)
    for writer in reversed(writers):
        os.rename(writer.folder, writer.output)
        atomic.fsync(writer.output.parent)
    for aside in old.values():
        shutil.rmtree(aside, ignore_errors=True)
