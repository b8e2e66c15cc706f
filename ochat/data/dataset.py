"""A prepared data set: shards of token ids and spans, mapped into memory, that turn into examples with weights at load.

    dataset = TokenDataset("data/train", classes=config.classes, weights=config.weights)
    dataset[0].input_ids, dataset.lengths, dataset.place(0)

`ochat prepare` writes the folder; shards.py describes it. Token ids stay in the file: all processes share their
pages.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import shards
from ochat.data.batch import Example as Example
from ochat.data.template import Template
from ochat.data.weights import ROLES, WeightRule
from ochat.errors import ConfigError, DataError


class TokenDataset:
    """A sequence of examples in input order.

    `classes` and `weights` decide what a supervised token weighs (weights.py). `only_class` keeps one class,
    `subsample` a share of each class that it names: the same conversations for the same seed, and a smaller share
    is part of a larger one. Raises DataError for a folder that is no data set, is incomplete, or lacks a reward
    that `weights` asks for (with its place); ConfigError for an unknown class and for a selection that leaves
    nothing.
    """

    path: Path
    manifest: dict[str, Any]
    template: Template
    class_names: tuple[str, ...]
    indices: NDArray[np.int64]  # (S,) places in the whole data set
    lengths: NDArray[np.int64]  # (S,) tokens
    class_ids: NDArray[np.int64]  # (S,) places in class_names
    supervised: NDArray[np.int64]  # (S,) labels of non-zero weight, that is counted after the shift

    def __init__(
        self,
        path: str | Path,
        *,
        classes: Mapping[str, ClassConfig] | None = None,
        weights: WeightsConfig | None = None,
        only_class: str = "",
        subsample: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        self.manifest = shards.read_manifest(self.path)
        if tuple(self.manifest["roles"]) != ROLES:
            raise DataError(
                f"{self.path}: its roles are {self.manifest['roles']}, not {list(ROLES)}: prepare the data again"
            )
        self.template = Template.from_dict(self.manifest["template"], str(self.path / shards.MANIFEST))
        self.class_names = tuple(self.manifest["classes"])
        self._shards = [_open_shard(shards.check_size(self.path, shard)) for shard in self.manifest["shards"]]
        self._shard_starts = np.cumsum([0, *(len(shard["class_ids"]) for shard in self._shards)])
        all_classes = self._column("class_ids").astype(np.int64)
        self._selection = {"only_class": only_class, "subsample": dict(subsample or {}), "seed": seed}
        self.indices = _select(self.class_names, all_classes, only_class, subsample or {}, seed)
        if not len(self.indices):
            raise ConfigError(f"{self.path}: only_class and subsample leave no conversation of {len(all_classes)}")
        self.class_ids = all_classes[self.indices]
        self.lengths = np.concatenate([np.diff(shard["offsets"]) for shard in self._shards])[self.indices]
        present = [self.class_names[i] for i in np.unique(self.class_ids)]
        self._rule = WeightRule(weights or WeightsConfig(), classes or {}, self.class_names, present)
        self._check_rewards()
        self.supervised = np.concatenate(list(self._count_supervised()))[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        """Ids (len,) int64 and weights (len,) float32 of a conversation, unshifted. Raises IndexError past the end."""
        shard, at = self._locate(index)
        begin, end = shard["offsets"][at], shard["offsets"][at + 1]
        lengths, weights = self._span_weights(shard, at, at + 1)
        return Example(
            input_ids=shard["input_ids"][begin:end].astype(np.int64),
            loss_weights=np.repeat(weights, lengths),
            condition=self.class_names[shard["class_ids"][at]],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens, their order and the selection, wherever the folder lies; weights do not count."""
        kept = {key: self.manifest[key] for key in ("template", "tokenizer", "context", "classes")}
        kept |= {"shards": [shard["sha256"] for shard in self.manifest["shards"]], "selection": self._selection}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def place(self, index: int) -> str:
        """ "file:line" of the record that an example came from."""
        shard, at = self._locate(index)
        return f"{self.manifest['files'][shard['files'][at]]}:{shard['lines'][at]}"

    def verify(self) -> None:
        """Read every shard and compare its sha256. Raises DataError naming the file."""
        for described in self.manifest["shards"]:
            path = shards.check_size(self.path, described)
            if shards.sha256(path) != described["sha256"]:
                raise DataError(
                    f"{path}: its content has changed since it was written: copy it again, or prepare again"
                )

    def _locate(self, index: int) -> tuple[dict[str, NDArray], int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        whole = int(self.indices[index])
        number = int(np.searchsorted(self._shard_starts, whole, side="right")) - 1
        return self._shards[number], whole - int(self._shard_starts[number])

    def _column(self, name: str) -> NDArray:
        return np.concatenate([shard[name] for shard in self._shards])

    def _span_weights(self, shard: dict[str, NDArray], begin: int, end: int) -> tuple[NDArray, NDArray[np.float32]]:
        """Lengths and weights of the spans of a shard's sequences begin ... end - 1."""
        offsets = shard["span_offsets"][begin : end + 1]
        spans = slice(int(offsets[0]), int(offsets[-1]))
        counts = np.diff(offsets)
        ends = shard["span_ends"][spans]
        starts = np.concatenate([[0], ends[:-1]])
        starts[(offsets[:-1] - offsets[0])] = 0  # every sequence has a span
        weights = self._rule(
            shard["span_weights"][spans],
            shard["span_roles"][spans],
            np.repeat(shard["class_ids"][begin:end], counts),
            np.repeat(shard["rewards"][begin:end], counts),
            ends - starts,
        )
        return ends - starts, weights

    def _count_supervised(self) -> Iterator[NDArray[np.int64]]:
        """Supervised labels of each sequence, one array per shard."""
        for shard in self._shards:
            lengths, weights = self._span_weights(shard, 0, len(shard["class_ids"]))
            first_spans = shard["span_offsets"][:-1]
            lengths[first_spans] -= 1  # a sequence's first token is nobody's label
            yield np.add.reduceat(np.where(weights != 0, lengths, 0), first_spans).astype(np.int64)

    def _check_rewards(self) -> None:
        """Raises DataError naming the first conversation whose weight the reward field cannot give."""
        if not self._rule.needs_reward:
            return
        rewards = self._column("rewards")[self.indices]
        with np.errstate(over="ignore"):
            wrong = np.flatnonzero(
                ~np.isfinite(np.exp((rewards.astype(np.float64) - 1) / self._rule.beta).astype(np.float32))
            )
        if len(wrong):
            first = int(wrong[0])
            what = "no reward" if np.isnan(rewards[first]) else f"the reward {rewards[first]}, whose weight is infinite"
            raise DataError(
                f'{self.place(first)}: the record has {what}, and weights.source = "reward" needs one in every record '
                f"({len(wrong)} such)"
            )


def _open_shard(path: Path) -> dict[str, NDArray]:
    """A shard's arrays as views of the mapped file."""
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            return {name: file.get_tensor(name).numpy() for name in names}
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}): copy it again, or prepare the data again") from error


def _select(
    names: tuple[str, ...], class_ids: NDArray[np.int64], only_class: str, subsample: Mapping[str, float], seed: int
) -> NDArray[np.int64]:
    """Places of the conversations that stay."""
    known = ", ".join(map(repr, names))
    for name in [only_class, *subsample] if only_class else [*subsample]:
        if name not in names:
            raise ConfigError(
                f"the data has no class {name!r} (its classes: {known}): correct data.only_class or data.subsample"
            )
    kept = np.ones(len(class_ids), bool) if not only_class else class_ids == names.index(only_class)
    for name, share in subsample.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"data.subsample of class {name!r} is {share}: a share from 0 to 1 is needed")
        members = np.flatnonzero(class_ids == names.index(name))
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(members))
        kept[members[order[round(share * len(members)) :]]] = False
    return np.flatnonzero(kept)
