"""Write a prepared data set: safetensors shards (store.py describes them) and, last, the manifest.

    with StoreWriter(Path("data/train"), vocab_size=32002) as writer:
        writer.add(sequences)
        writer.seal(manifest)
        publish([writer])

Everything is written into a temporary folder next to the destination, which one rename puts in place: a preparation
that is interrupted leaves nothing that loads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ochat.data import manifest as manifests
from ochat.data.manifest import FORMAT, MANIFEST, VERSION
from ochat.data.weights import FACTORS, ROLES
from ochat.errors import ConfigError, DataError
from ochat.files import atomic

SHARD_TOKENS = 1 << 26  # 256 MiB of ids at most: what the writer holds in memory


@dataclass
class Sequences:
    """Encoded conversations in order; what a worker returns."""

    input_ids: list[NDArray[np.uint32]] = field(default_factory=list)  # per sequence
    span_ends: list[list[int]] = field(default_factory=list)
    span_roles: list[list[int]] = field(default_factory=list)
    span_weights: list[list[float]] = field(default_factory=list)
    span_conditions: list[list[str]] = field(default_factory=list)  # of the span's message, or the conversation's
    span_prefixes: list[list[int]] = field(default_factory=list)  # as Span.prefix has them
    span_factors: list[list[float]] = field(default_factory=list)  # of all sequences, or without token weights of none
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
            "span_prefixes": np.array([number for numbers in self.span_prefixes for number in numbers], np.uint8),
            "class_ids": _numbers(self.conditions, class_ids, "classes"),
            "span_class_ids": _numbers(
                [name for names in self.span_conditions for name in names], class_ids, "classes"
            ),
            "rewards": np.array(self.rewards, np.float32),
            "lines": np.array(self.lines, np.int64),
            "files": _numbers(self.files, file_ids, "files"),
            FACTORS: np.array([factor for factors in self.span_factors for factor in factors], np.float32),
        }


def _numbers(names: list[str], known: dict[str, int], what: str) -> NDArray[np.uint16]:
    numbers = [known.setdefault(name, len(known)) for name in names]
    if len(known) > manifests.MAX_NAMES:
        raise DataError(f"more than {manifests.MAX_NAMES} {what}, the last one {names[-1]!r}: a data set holds no more")
    return np.array(numbers, np.uint16)


class StoreWriter:
    """Collects sequences and writes a shard when there are enough tokens for one; `seal` writes the rest and the
    manifest, and `publish` gives the folder its name.

    Use as a context manager: leaving it by an exception or a SIGTERM removes everything written so far.
    Raises ConfigError for an output that exists, unless it is a data set and `overwrite` is given.
    """

    def __init__(self, output: Path, vocab_size: int, *, overwrite: bool = False) -> None:
        self.output = output
        self.id_dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._partial = atomic.staging_dir(output)
        self._class_ids: dict[str, int] = {}
        self._file_ids: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._parts: list[dict[str, NDArray]] = []
        self._num_tokens = 0
        self._num_roles = ROLES.index("tool")  # as many as the data has, "tool" being younger than the format
        _check_destination(output, overwrite)

    def __enter__(self) -> StoreWriter:
        self.folder = self._partial.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._partial.__exit__(*error)

    def add(self, sequences: Sequences) -> None:
        """Append sequences."""
        arrays = sequences.arrays(self._class_ids, self._file_ids, self.id_dtype)
        self._parts.append(arrays)
        self._num_tokens += len(arrays["input_ids"])
        self._num_roles = max(self._num_roles, int(arrays["span_roles"].max(initial=0)) + 1)
        if self._num_tokens >= SHARD_TOKENS:
            self._write_shard()

    @property
    def classes(self) -> list[str]:
        """Those of all sequences so far."""
        return list(self._class_ids)

    def seal(self, manifest: dict[str, Any]) -> None:
        """Write what is left and the manifest, last."""
        if self._num_tokens:
            self._write_shard()
        described = {"format": FORMAT, "version": VERSION, **manifest, "classes": self.classes}
        known = {shard["file"] for shard in self._shards}
        others = [manifests.describe_file(path) for path in sorted(self.folder.iterdir()) if path.name not in known]
        roles, files = list(ROLES[: self._num_roles]), list(self._file_ids)
        described |= {"roles": roles, "files": files, "shards": self._shards, "others": others}
        manifests.write_manifest(self.folder / MANIFEST, described)

    def _write_shard(self) -> None:
        # each column's parts are freed before the next column is joined, so memory holds only the token ids twice
        joined = {name: np.concatenate([part.pop(name) for part in self._parts]) for name in list(self._parts[0])}
        self._parts, self._num_tokens = [], 0
        if (joined["span_class_ids"] == np.repeat(joined["class_ids"], joined["span_counts"])).all():
            del joined["span_class_ids"]
        if not len(joined[FACTORS]):
            del joined[FACTORS]
        for counts, offsets in (("lengths", "offsets"), ("span_counts", "span_offsets")):
            joined[offsets] = np.cumsum(np.concatenate([np.zeros(1, np.int64), joined.pop(counts)]))
        path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        try:
            save_file(joined, path, metadata={"format": FORMAT})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{self.output}: cannot be written: {error}") from None
        path.chmod(self.folder.stat().st_mode & 0o666)  # the library makes files that only their owner may read
        atomic.fsync(path)
        sizes = {"sequences": len(joined["class_ids"]), "tokens": len(joined["input_ids"])}
        self._shards.append(manifests.describe_file(path) | sizes)


def publish(writers: Sequence[StoreWriter]) -> None:
    """Give sealed sets that belong together their names, the first one last: if it exists, all exist and are of one
    run.

    A first set that was there before is moved away before anything else, so a kill in between leaves no mixture.
    """
    old = {writer.output: atomic.replaced(writer.output) for writer in writers}
    for output, aside in old.items():
        if output.exists():
            os.rename(output, aside)
    for writer in reversed(writers):
        os.rename(writer.folder, writer.output)
        atomic.fsync(writer.output.parent)
    for aside in old.values():
        atomic.remove(aside)


def _check_destination(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST).is_file():
        raise ConfigError(f"{output}: exists and is no data set: give another --output")
    if not overwrite:
        raise ConfigError(f"{output}: a data set is there already: give another --output, or --overwrite to replace it")
