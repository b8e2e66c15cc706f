"""Shards of prepared data sets, mapped into memory: their columns are views of the files, which all processes share.

    class_names, shards = open_all([manifest_and_folder, ...])
    table = address_table(shards)      # for the compiled loops of fill.py

Opening reads headers and, to refuse a damaged file before a loop runs through it, offsets and spans; never token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ochat.data import fill, shards
from ochat.data.weights import ROLES, WeightRule, own_weights
from ochat.errors import DataError

COLUMNS = {  # shards.py says what they hold
    "offsets": np.int64,
    "span_offsets": np.int64,
    "span_ends": np.int32,
    "span_roles": np.uint8,
    "span_weights": np.float32,
    "class_ids": np.uint16,
    "rewards": np.float32,
    "lines": np.int64,
    "files": np.uint16,
}


@dataclass(frozen=True, eq=False)
class Shard:
    """One file, and what its numbers of classes and input files mean."""

    path: Path
    columns: dict[str, NDArray]
    class_map: NDArray[np.uint16]  # the shard's class id -> its place among the classes of all shards
    files: Sequence[str]  # the shard's input files by number

    def __len__(self) -> int:
        return len(self.columns["class_ids"])

    def __getitem__(self, name: str) -> NDArray:
        return self.columns[name]


def open_all(sets: Sequence[tuple[Path, dict[str, Any]]]) -> tuple[tuple[str, ...], list[list[Shard]]]:
    """The classes of all data sets (folder, manifest) together, and the shards of each.

    Raises DataError for a file that is missing, has another size than was written, or whose columns do not fit
    together.
    """
    class_ids: dict[str, int] = {}
    for _, manifest in sets:
        for name in manifest["classes"]:
            class_ids.setdefault(name, len(class_ids))
    opened = [
        [_open(folder, manifest, described, class_ids) for described in manifest["shards"]] for folder, manifest in sets
    ]
    return tuple(class_ids), opened


def address_table(opened: Sequence[Shard]) -> NDArray[np.int64]:
    """(P, 11) int64, a row per shard with its columns' addresses (fill.py); the shards must outlive it."""
    table = np.zeros((len(opened), fill.IS_WIDE + 1), np.int64)
    first = 0
    for row, shard in zip(table, opened, strict=True):
        row[fill.FIRST] = first
        for place, name in (
            (fill.OFFSETS, "offsets"),
            (fill.SPAN_OFFSETS, "span_offsets"),
            (fill.SPAN_ENDS, "span_ends"),
            (fill.SPAN_ROLES, "span_roles"),
            (fill.SPAN_WEIGHTS, "span_weights"),
            (fill.CLASS_IDS, "class_ids"),
            (fill.REWARDS, "rewards"),
            (fill.IDS, "input_ids"),
        ):
            row[place] = shard[name].ctypes.data
        row[fill.CLASS_MAP] = shard.class_map.ctypes.data
        row[fill.IS_WIDE] = shard["input_ids"].dtype == np.uint32
        first += len(shard)
    return table


def compiled_rule(rule: WeightRule) -> fill.Rule:
    """The rule as the loops of fill.py take it, which weigh a span at a time."""
    roles = np.arange(len(ROLES), dtype=np.uint8)
    return fill.Rule(
        source={"record": fill.RECORD, "classes": fill.CLASSES, "reward": fill.REWARD, "none": fill.NONE}[rule.source],
        defaults=own_weights(np.full(len(ROLES), np.nan, np.float32), roles),
        by_class=rule.by_class,
        beta=float(rule.beta),
        is_mean=bool(rule.per_message_mean),
    )


def _open(folder: Path, manifest: dict[str, Any], described: dict[str, Any], class_ids: dict[str, int]) -> Shard:
    """One shard, whose classes stand in `class_ids`."""
    classes, files = shards.names(manifest, described)
    class_map = np.array([class_ids[name] for name in classes], np.uint16)
    path = shards.check_size(folder, described)
    return Shard(path, _columns(path, len(class_map)), class_map, files)


def _columns(path: Path, num_classes: int) -> dict[str, NDArray]:
    """A shard's arrays as views of the mapped file."""
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            columns = {name: file.get_tensor(name).numpy() for name in names}
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}): copy it again, or prepare the data again") from error
    _check(path, columns, num_classes)
    return columns


def _check(path: Path, columns: dict[str, NDArray], num_classes: int) -> None:
    """Raises DataError unless every sequence's tokens, spans and class lie within the shard."""
    again = "copy it again, or prepare the data again"
    for name, dtype in COLUMNS.items():
        if name not in columns or columns[name].dtype != dtype or columns[name].ndim != 1:
            raise DataError(f"{path}: damaged (its column {name} is no list of {np.dtype(dtype)}): {again}")
    if "input_ids" not in columns or columns["input_ids"].dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path}: damaged (its input_ids are no list of uint16 or uint32): {again}")
    num_sequences, num_spans = len(columns["class_ids"]), len(columns["span_ends"])
    expected = {"offsets": num_sequences + 1, "span_offsets": num_sequences + 1}
    expected |= dict.fromkeys(("rewards", "lines", "files"), num_sequences)
    expected |= dict.fromkeys(("span_roles", "span_weights"), num_spans)
    for name, length in expected.items():
        if len(columns[name]) != length:
            raise DataError(f"{path}: damaged ({name} has {len(columns[name])} entries, not {length}): {again}")
    wrong = fill.first_damaged(
        len(columns["input_ids"]),
        columns["offsets"],
        columns["span_offsets"],
        columns["span_ends"],
        columns["span_roles"],
        len(ROLES),
        columns["class_ids"],
        num_classes,
    )
    if wrong >= 0:
        raise DataError(f"{path}: damaged (sequence {wrong} lies outside its columns): {again}")
