"""Prepared data: shards of token ids and spans, mapped into memory, that turn into examples with weights at load.

    dataset = TokenDataset("data/train", classes=config.classes, weights=config.weights)
    dataset[0].input_ids, dataset.lengths, dataset.source_location(0), dataset.batch([0, 5])
    TokenDataset({"chat": "data/chat", "code": "data/code"}).sets["code"]     # several, one after the other

`ochat prepare` writes the folder; shards.py describes it, mapped.py maps it. Token ids, spans, lines and rewards stay
in the files, whose pages all processes share; a process holds 14 bytes a sequence, 4 more under a selection.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import fill, mapped, shards
from ochat.data.batch import Example as Example
from ochat.data.batch import PackedBatch, allocate, documents
from ochat.data.mapped import Shard
from ochat.data.weights import ROLES, WeightRule
from ochat.errors import ConfigError, DataError
from ochat.text.template import Span, Template

FILLED = (
    "input_ids",
    "labels",
    "loss_weights",
    "position_ids",
    "supervised_rows",
    "supervised_classes",
)  # in fill_batch's order


class TokenDataset:
    """A sequence of examples in input order. `path`: a folder, or several by name, whose classes are united by name.

    `classes` and `weights` decide what a supervised token weighs (weights.py). `only_class` keeps one class,
    `subsample` a share of each class that it names: the same conversations for the same seed, and a smaller share
    is part of a larger one. Raises DataError for a folder that is no data set, is incomplete, or lacks a reward
    that `weights` asks for (with its place); ConfigError for an unknown class, for a selection that leaves nothing
    and for sets of different templates or tokenizers.
    """

    manifests: dict[str, tuple[Path, dict[str, Any]]]  # folder and manifest of each set
    path: Path  # the first set's, as are manifest and template
    manifest: dict[str, Any]
    template: Template
    sets: dict[str, slice]  # the examples of each set
    class_names: tuple[str, ...]
    lengths: NDArray[np.int64]  # (S,) tokens
    class_ids: NDArray[np.uint16]  # (S,) places in class_names
    supervised: NDArray[np.int32]  # (S,) labels of non-zero weight, that is counted after the shift

    def __init__(
        self,
        path: str | Path | Mapping[str, str | Path],
        *,
        classes: Mapping[str, ClassConfig] | None = None,
        weights: WeightsConfig | None = None,
        only_class: str = "",
        subsample: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        paths = {name: Path(each) for name, each in (path if isinstance(path, Mapping) else {"": path}).items()}
        self.manifests = {name: (each, _read_manifest(each)) for name, each in paths.items()}
        _check_alike(self.manifests)
        self.path, self.manifest = next(iter(self.manifests.values()))
        self.template = Template.from_dict(self.manifest["template"], str(self.path / shards.MANIFEST))
        self.class_names, opened = mapped.open_all(list(self.manifests.values()))
        self._shards = [shard for of_set in opened for shard in of_set]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._table = mapped.address_table(self._shards)
        self._selection = {"only_class": only_class, "subsample": dict(subsample or {}), "seed": seed}
        class_ids = self._filled(np.uint16, _class_ids)
        self._kept = _select(self.class_names, class_ids, only_class, subsample or {}, seed)
        if self._kept is not None and not len(self._kept):
            raise ConfigError(f"{self.path}: only_class and subsample leave no conversation of {len(class_ids)}")
        self.sets = self._slices([sum(map(len, of_set)) for of_set in opened])
        self.class_ids = self._of_kept(class_ids)
        self.lengths = self._of_kept(self._filled(np.int64, _lengths))
        present = [self.class_names[i] for i in np.flatnonzero(_counts(self.class_ids, len(self.class_names)))]
        self._rule = WeightRule(weights or WeightsConfig(), classes or {}, self.class_names, present)
        self._compiled = mapped.compiled_rule(self._rule)
        self._check_rewards()
        self.supervised = self._of_kept(self._filled(np.int32, self._count_supervised))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Ids (len,) int64 and weights (len,) float32 of a conversation, unshifted. Raises IndexError past the end."""
        shard, at = self._locate(index)
        begin, end = shard["offsets"][at], shard["offsets"][at + 1]
        lengths, weights = self._span_weights(shard, at)
        return Example(
            input_ids=shard["input_ids"][begin:end].astype(np.int64),
            loss_weights=np.repeat(weights, lengths),
            condition=self.class_names[shard.class_map[shard["class_ids"][at]]],
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def indices(self) -> NDArray[np.integer]:
        """(S,) places in the whole data set."""
        return np.arange(len(self)) if self._kept is None else self._kept

    def batch(
        self, indices: ArrayLike, *, pad_to: int | None = None, num_documents: int | None = None, pin: bool = False
    ) -> PackedBatch:
        """What `pack` makes of these examples, by one compiled pass over the mapped files; `pin`: in pinned memory.

        Costs at 40,960 tokens: benchmarks/results/loader.csv. Raises IndexError past the ends.
        """
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"examples {chosen.min()} ... {chosen.max()} of {len(self)}")
        wholes = chosen if self._kept is None else self._kept[chosen].astype(np.int64)
        in_shards = np.searchsorted(self._starts, wholes, side="right") - 1
        lengths, max_seqlen = documents(self.lengths[chosen].tolist(), pad_to, num_documents)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        tensors = allocate(int(cu_seqlens[-1]), len(lengths), pin)
        tensors["cu_seqlens"].numpy()[:] = cu_seqlens
        num_rows, weight_sum = fill.fill_batch(
            self._table, in_shards, wholes, cu_seqlens, self._compiled, *(tensors[name].numpy() for name in FILLED)
        )
        tensors |= {name: tensors[name][:num_rows] for name in ("supervised_rows", "supervised_classes")}
        return PackedBatch(
            **tensors,
            max_seqlen=max_seqlen,
            num_tokens=int(cu_seqlens[len(chosen)]),
            num_supervised=num_rows,
            weight_sum=weight_sum,
            lengths=tuple(lengths),
            sequences=tuple(chosen.tolist()),
        )

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens, their order and the selection, wherever the folder lies; weights do not count."""
        keys = ("template", "tokenizer", "context", "classes")
        kept: list[Any] = [
            {key: manifest[key] for key in keys} | {"shards": [shard["sha256"] for shard in manifest["shards"]]}
            for _, manifest in self.manifests.values()
        ]
        first = kept[0] | {"selection": self._selection} | ({"others": kept[1:]} if kept[1:] else {})
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()

    def mean_weight(self, name: str, sample: int = 200) -> float:
        """Mean |weight| of the supervised tokens in the first `sample` conversations of a class."""
        members = np.flatnonzero(self.class_ids == self.class_names.index(name))[:sample]
        weights = np.abs(np.concatenate([self[int(i)].loss_weights for i in members]))
        return float(weights.sum() / max(1, np.count_nonzero(weights)))

    def source_location(self, index: int) -> str:
        """ "file:line" of the record that an example came from."""
        shard, at = self._locate(index)
        return f"{shard.files[shard['files'][at]]}:{shard['lines'][at]}"

    def spans(self, index: int) -> list[Span]:
        """The stretches of an example, each of one role, with the weights that its record gives."""
        shard, at = self._locate(index)
        held = slice(int(shard["span_offsets"][at]), int(shard["span_offsets"][at + 1]))
        columns = (shard[name][held].tolist() for name in ("span_ends", "span_roles", "span_weights"))
        return [
            Span(end, ROLES[role], None if math.isnan(weight) else weight)
            for end, role, weight in zip(*columns, strict=True)
        ]

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        whole = int(index % len(self) if self._kept is None else self._kept[index])
        number = int(np.searchsorted(self._starts, whole, side="right")) - 1
        return self._shards[number], whole - int(self._starts[number])

    def _slices(self, sizes: list[int]) -> dict[str, slice]:
        """Which examples are each set's, of sets of so many sequences before the selection."""
        ends = np.cumsum([0, *sizes])
        places = (ends if self._kept is None else np.searchsorted(self._kept, ends)).tolist()
        return {name: slice(*places[i : i + 2]) for i, name in enumerate(self.manifests)}

    def _filled(self, dtype: type, write: Callable[[Shard, NDArray], None]) -> NDArray:
        """A column of the whole data set, which `write` fills shard by shard."""
        column = np.empty(self._starts[-1], dtype)
        for shard, first in zip(self._shards, self._starts, strict=False):
            write(shard, column[first : first + len(shard)])
        return column

    def _of_kept(self, column: NDArray) -> NDArray:
        return column if self._kept is None else column[self._kept]

    def _span_weights(self, shard: Shard, at: int) -> tuple[NDArray, NDArray[np.float32]]:
        """Lengths and weights of a sequence's spans."""
        spans = slice(int(shard["span_offsets"][at]), int(shard["span_offsets"][at + 1]))
        lengths = np.diff(shard["span_ends"][spans], prepend=0)
        class_ids = np.full(len(lengths), shard.class_map[shard["class_ids"][at]])
        rewards = np.full(len(lengths), shard["rewards"][at])
        return lengths, self._rule(
            shard["span_weights"][spans], shard["span_roles"][spans], class_ids, rewards, lengths
        )

    def _count_supervised(self, shard: Shard, counts: NDArray[np.int32]) -> None:
        fill.count_supervised(
            shard["span_offsets"],
            shard["span_ends"],
            shard["span_roles"],
            shard["span_weights"],
            shard["class_ids"],
            shard["rewards"],
            shard.class_map,
            self._compiled,
            counts,
        )

    def _check_rewards(self) -> None:
        """Raises DataError naming the first conversation whose weight the reward field cannot give."""
        if not self._rule.needs_reward:
            return
        rewards = self._of_kept(self._filled(np.float32, _rewards))
        with np.errstate(over="ignore"):
            wrong = np.flatnonzero(
                ~np.isfinite(np.exp((rewards.astype(np.float64) - 1) / self._rule.beta).astype(np.float32))
            )
        if len(wrong):
            first = int(wrong[0])
            what = "no reward" if np.isnan(rewards[first]) else f"the reward {rewards[first]}, whose weight is infinite"
            raise DataError(
                f'{self.source_location(first)}: the record has {what}, and weights.source = "reward" needs one in '
                f"every record ({len(wrong)} such)"
            )


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = shards.read_manifest(path)
    if tuple(manifest["roles"]) != ROLES:
        raise DataError(f"{path}: its roles are {manifest['roles']}, not {list(ROLES)}: prepare the data again")
    return manifest


def _check_alike(sets: Mapping[str, tuple[Path, dict[str, Any]]]) -> None:
    """Raises ConfigError for a set that was prepared otherwise than the first; the context may differ."""
    (first, (path, manifest)), *others = sets.items()
    for name, (other, its) in others:
        for what, differs in (
            ("tokenizer", its["tokenizer"].get("fingerprint") != manifest["tokenizer"].get("fingerprint")),
            ("template or --conditions", its["template"] | {"context": 0} != manifest["template"] | {"context": 0}),
        ):
            if differs:
                raise ConfigError(
                    f"data.mix.{name} ({other}): prepared with another {what} than data.mix.{first} ({path}): prepare "
                    "both with the same base and template"
                )


def _lengths(shard: Shard, column: NDArray[np.int64]) -> None:
    np.subtract(shard["offsets"][1:], shard["offsets"][:-1], out=column)


def _class_ids(shard: Shard, column: NDArray[np.uint16]) -> None:
    np.take(shard.class_map, shard["class_ids"], out=column)


def _rewards(shard: Shard, column: NDArray[np.float32]) -> None:
    column[:] = shard["rewards"]


def _counts(class_ids: NDArray[np.uint16], num_classes: int) -> NDArray[np.int64]:
    """Sequences of each class; in blocks, because bincount copies what it counts to int64."""
    blocks = range(0, len(class_ids), 1 << 20)
    return sum(
        (np.bincount(class_ids[b : b + (1 << 20)], minlength=num_classes) for b in blocks),
        np.zeros(num_classes, np.int64),
    )


def _select(
    names: tuple[str, ...], class_ids: NDArray[np.uint16], only_class: str, subsample: Mapping[str, float], seed: int
) -> NDArray[np.integer] | None:
    """Places of the conversations that stay; None: all of them."""
    known = ", ".join(map(repr, names))
    for name in [only_class, *subsample] if only_class else [*subsample]:
        if name not in names:
            raise ConfigError(
                f"the data has no class {name!r} (its classes: {known}): correct data.only_class or data.subsample"
            )
    if not only_class and not subsample:
        return None
    kept = np.ones(len(class_ids), bool) if not only_class else class_ids == names.index(only_class)
    for name, share in subsample.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"data.subsample of class {name!r} is {share}: a share from 0 to 1 is needed")
        members = np.flatnonzero(class_ids == names.index(name))
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(members))
        kept[members[order[round(share * len(members)) :]]] = False
    return np.flatnonzero(kept).astype(np.int32 if len(kept) < 1 << 31 else np.int64)
