"""Prepared data: token ids and spans in memory-mapped shards, which get their loss weights when they are read.

    dataset = TokenDataset("data/train", classes=config.classes, weights=config.weights)
    dataset[0].input_ids, dataset.lengths, dataset.source_location(0), dataset.batch([0, 5])
    TokenDataset(["data/1", "data/2"])                                        # the shards of one input
    TokenDataset({"chat": "data/chat", "code": "data/code"}).sets["code"]     # sets to mix, one after the other

`ochat prepare` writes the folders and store.py maps them. Token ids, spans, lines and rewards stay in the files, whose
pages all processes share; a process holds 14 bytes a sequence, 4 more with a selection.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import manifest, store
from ochat.data.batch import Example, PackedBatch, assemble
from ochat.data.manifest import MANIFEST, Prepared
from ochat.data.store import Shard, Tokens
from ochat.data.weights import ROLES, WeightRule, are_unusable
from ochat.errors import ConfigError, DataError
from ochat.text.reward_text import RewardText
from ochat.text.template import Span, Template
from ochat.text.token_weights import MAX_WEIGHT

Paths = str | Path | Sequence[str | Path]  # a folder, or the folders of one input's shards


class TokenDataset:
    """A sequence of examples in input order. `path`: a folder, a list of folders that are joined in order, or either by
    name; classes of the same name are one class.

    `classes` and `weights` decide what a supervised token weighs (weights.py). `only_class` keeps one class,
    `subsample` a share of each class that it names: the same conversations for the same seed, and a smaller share
    is part of a larger one. Raises DataError for a folder that is no data set, is incomplete, lacks a reward that
    `weights` asks for or has a weight too large to train with (with its place); ConfigError for an unknown class, for a
    selection that leaves nothing and for sets of different templates or tokenizers.
    """

    folders: dict[str, list[Prepared]]  # folders and manifests of each set
    prepared: list[Prepared]  # those of all sets
    path: Path  # the first folder, whose manifest and template these are
    manifest: dict[str, Any]
    template: Template
    sets: dict[str, slice]  # the examples of each set
    class_names: tuple[str, ...]
    present: tuple[str, ...]  # those of conversations, or of messages that have their own
    lengths: NDArray[np.int64]  # (S,) tokens
    class_ids: NDArray[np.uint16]  # (S,) places in class_names of the conversations' classes
    supervised: NDArray[np.int32]  # (S,) labels of non-zero weight, that is counted after the shift

    def __init__(
        self,
        path: Paths | Mapping[str, Paths],
        *,
        classes: Mapping[str, ClassConfig] | None = None,
        weights: WeightsConfig | None = None,
        only_class: str = "",
        subsample: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        by_name = path if isinstance(path, Mapping) else {"": path}
        self.folders = {name: manifest.read_together(folder_list(each)) for name, each in by_name.items()}
        _check_alike({name: prepared[0] for name, prepared in self.folders.items()})
        self.prepared = [one for of_set in self.folders.values() for one in of_set]
        self.path, self.manifest = self.prepared[0]
        self.template = Template.from_dict(self.manifest["template"], str(self.path / MANIFEST))
        self.class_names, opened = store.open_sets(self.folders)
        self._shards = [shard for of_set in opened.values() for shard in of_set]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._selection = {"only_class": only_class, "subsample": dict(subsample or {}), "seed": seed}
        self._kept = None
        class_ids = self._column(np.uint16, Shard.class_ids)
        self._kept = _select(self.class_names, class_ids, only_class, subsample or {}, seed)
        if self._kept is not None and not len(self._kept):
            raise ConfigError(f"{self.path}: only_class and subsample leave no conversation of {len(class_ids)}")
        ends = np.cumsum([0, *(sum(map(len, of_set)) for of_set in opened.values())])
        places = (ends if self._kept is None else np.searchsorted(self._kept, ends)).tolist()
        self.sets = {name: slice(*pair) for name, pair in zip(opened, itertools.pairwise(places), strict=True)}
        self.class_ids = self._column(np.uint16, Shard.class_ids)
        self.lengths = self._column(np.int64, Shard.lengths)
        self.present = tuple(self.class_names[i] for i in self._present())
        self._rule = WeightRule(weights or WeightsConfig(), classes or {}, self.class_names, self.present)
        self._check_weights()
        self.supervised = self._count_labels(lambda weights: weights != 0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Ids (len,) int64 and weights (len,) float32 of a conversation, unshifted. Raises IndexError past the end."""
        tokens = self._read(index)
        return Example(tokens.input_ids.astype(np.int64), tokens.loss_weights, self.class_names[self.class_ids[index]])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def indices(self) -> NDArray[np.integer]:
        """(S,) places in the whole data set."""
        return np.arange(len(self)) if self._kept is None else self._kept

    @property
    def levels(self) -> list[str]:
        """The classes that `prepare --condition-from` wrote, from the lowest reward on; [] where it did not."""
        described = self.manifest.get("condition_from")
        return (
            RewardText.of_manifest(described, self.template.attributes).in_order(self.class_names) if described else []
        )

    def lengths_under(self, under: NDArray[np.integer]) -> NDArray[np.int64]:
        """(S,) tokens, each example `under` OWN conditions, NONE or a class (its place in class_names); at most the
        context that the data was prepared with."""
        return self._lengths(Shard.lengths_under, under)

    def count_cut(self, under: NDArray[np.integer]) -> tuple[int, int]:
        """How many examples have prefixes, `under` these conditions, that push their end out of the context; and the
        most tokens that one loses."""
        lost = self._lengths(Shard.uncut_lengths_under, under) - self.lengths_under(under)
        return int(np.count_nonzero(lost)), int(lost.max(initial=0))

    def _lengths(
        self, read: Callable[[Shard, NDArray, NDArray], NDArray[np.int64]], under: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        lengths = np.empty(len(self), np.int64)
        for shard, at, of_shard in self._by_shard(np.arange(len(self))):
            lengths[of_shard] = read(shard, at, under[of_shard])
        return lengths

    def check_exchangeable(self, asked: str, classes: Sequence[str] = ()) -> None:
        """Raises: DataError for a data set that does not say where its prefixes are, ConfigError for one in which they
        cannot be exchanged, also for those of one of `classes`. `asked`: what needs them."""
        for folder, described in self.prepared:
            prefixes = described.get("prefixes", {})
            if prefixes.get("refused"):
                raise ConfigError(f"{asked}: {folder}: {prefixes['refused']}; leave it out, or choose another template")
            if "ids" not in prefixes:
                raise DataError(
                    f"{asked}: {folder} was prepared by a version that did not write down where the condition stands: "
                    "prepare it again"
                )
            if missing := [name for name in classes if name not in prefixes["ids"]]:
                raise ConfigError(
                    f"{asked}: {folder} has no {missing[0]!r}, which others have: prepare them with the same --bins"
                )

    def batch(self, indices: ArrayLike, under: NDArray[np.integer] | None = None, **shape: Any) -> PackedBatch:
        """These examples as one micro-batch of a `shape` (see `assemble`), each `under` the conditions that
        lengths_under describes (None: its own). Raises IndexError past the ends.

        Costs at 40,960 tokens: benchmarks/results/loader.csv.
        """
        chosen = np.asarray(indices, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"examples {chosen.min()} ... {chosen.max()} of {len(self)}")
        parts, lengths = list(self._by_shard(chosen)), self.lengths[chosen]
        if under is not None:
            for shard, at, of_shard in parts:
                lengths[of_shard] = shard.lengths_under(at, under[of_shard])
        begins = np.cumsum(lengths) - lengths
        input_ids = np.empty(lengths.sum(), np.int64)
        loss_weights, class_ids = np.empty(len(input_ids), np.float32), np.empty(len(input_ids), np.int64)
        for shard, at, of_shard in parts:
            to = store.ranges(begins[of_shard], lengths[of_shard])
            exchanged = None if under is None else under[of_shard]
            input_ids[to], loss_weights[to], class_ids[to] = shard.read(at, self._rule, exchanged)
        return assemble(input_ids, loss_weights, lengths, class_ids, tuple(chosen.tolist()), **shape)

    @property
    def fingerprint(self) -> str:
        """sha256 over tokens, their order and the selection, wherever the folder lies; weights do not count."""
        prints = [_fingerprint(prepared) for prepared in self.folders.values()]
        first = prints[0] | {"selection": self._selection} | ({"others": prints[1:]} if prints[1:] else {})
        return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()

    def has_negative_weights(self) -> bool:
        """Whether the weight of some label is below 0. Costs: a pass over the spans, as opening does."""
        return bool(self._count_labels(lambda weights: weights < 0).any())

    def mean_weight(self, name: str, sample: int = 200) -> float:
        """Mean |weight| of the supervised tokens of a class in the first `sample` conversations that hold it."""
        class_id = self.class_names.index(name)
        members = [self._read(int(i)) for i in np.flatnonzero(self._holds(class_id))[:sample]]
        weights = np.abs(np.concatenate([each.loss_weights[each.class_ids == class_id] for each in members]))
        return float(weights.sum() / max(1, np.count_nonzero(weights)))

    def class_counts(self) -> dict[str, int]:
        """How many conversations hold a message of each class, of those classes that any holds."""
        return {name: int(self._holds(self.class_names.index(name)).sum()) for name in self.present}

    def source_location(self, index: int) -> str:
        """ "file:line" of the record that an example came from."""
        shard, at = self._locate(index)
        return f"{shard.files[shard['files'][at]]}:{shard['lines'][at]}"

    def spans(self, index: int) -> list[Span]:
        """The stretches of an example, each of one role, with the weights that its record gives."""
        shard, at = self._locate(index)
        return shard.spans(at, self.class_names)

    def _read(self, index: int) -> Tokens:
        shard, at = self._locate(index)
        return shard.read(np.array([at]), self._rule)

    def _holds(self, class_id: int) -> NDArray[np.bool_]:
        """(S,) whether a conversation has a message of the class."""
        return self._column(bool, lambda shard: shard.holds_class(class_id))

    def _present(self) -> list[int]:
        """The classes of all conversations, or of their messages, in order."""
        if not any(shard.has_turn_classes for shard in self._shards):
            return np.unique(self.class_ids).tolist()
        each = self._by_shard(np.arange(len(self.class_ids)))
        return sorted({int(i) for shard, at, _ in each for i in shard.classes_of(at)})

    def _by_shard(self, chosen: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.bool_]]]:
        """The shards of some examples: (shard, the places in it, which of `chosen` they are)."""
        wholes = chosen if self._kept is None else self._kept[chosen].astype(np.int64)
        numbers = np.searchsorted(self._starts, wholes, side="right") - 1
        for number in np.unique(numbers):
            of_shard = numbers == number
            yield self._shards[number], wholes[of_shard] - self._starts[number], of_shard

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        whole = int(index % len(self) if self._kept is None else self._kept[index])
        number = int(np.searchsorted(self._starts, whole, side="right")) - 1
        return self._shards[number], whole - int(self._starts[number])

    def _column(self, dtype: type, read: Callable[[Shard], NDArray]) -> NDArray:
        """What `read` gives of each shard, as one column of the sequences that are kept."""
        column = np.empty(self._starts[-1], dtype)
        for shard, first in zip(self._shards, self._starts, strict=False):
            column[first : first + len(shard)] = read(shard)
        return column if self._kept is None else column[self._kept]

    def _count_labels(self, are_counted: Callable[[NDArray[np.float32]], NDArray]) -> NDArray[np.int32]:
        """(S,) labels whose weights are counted. Costs: a pass over the spans."""
        return self._column(np.int32, lambda shard: shard.count_labels(self._rule, are_counted))

    def _check_weights(self) -> None:
        """Raises DataError naming the first conversation with a weight that cannot be trained with."""
        wrong = np.flatnonzero(self._count_labels(are_unusable))
        if not len(wrong):
            return
        first = int(wrong[0])
        shard, at = self._locate(first)
        weights, reward = self._read(first).loss_weights, shard["rewards"][at]
        weight = weights[are_unusable(weights)][0]
        what = f"the record gives a token the weight {weight:.3g}; at most {MAX_WEIGHT:g} is used"
        if self._rule.needs_reward:
            what = f"the record has the reward {reward:.6g}, whose weight is infinite or more than {MAX_WEIGHT:g}"
            if np.isnan(reward):
                what = 'the record has no reward, and weights.source = "reward" needs one in every record'
        raise DataError(f"{self.source_location(first)}: {what} ({len(wrong)} such): correct the data")


def folder_list(paths: Paths) -> list[Path]:
    """One folder or several as a list."""
    return [Path(paths)] if isinstance(paths, str | Path) else list(map(Path, paths))


def shown_paths(paths: Paths) -> str:
    """The folders in a message."""
    return ", ".join(map(str, folder_list(paths)))


def _fingerprint(prepared: list[Prepared]) -> dict[str, Any]:
    """What identifies joined sets; of one folder as of the same shards in several."""
    first, manifests = prepared[0].manifest, [one.manifest for one in prepared]
    classes = list(dict.fromkeys(name for each in manifests for name in each["classes"]))
    digests = [shard["sha256"] for each in manifests for shard in each["shards"]]
    return {key: first[key] for key in ("template", "tokenizer", "context")} | {"classes": classes, "shards": digests}


def _check_alike(sets: Mapping[str, Prepared]) -> None:
    """Raises DataError for roles of another release, ConfigError for a set that was prepared otherwise than the first;
    the context may differ."""
    (first, (path, ours)), *others = sets.items()
    for folder, theirs in sets.values():
        if tuple(theirs["roles"]) != ROLES[: len(theirs["roles"])]:
            raise DataError(f"{folder}: its roles are {theirs['roles']}, not {list(ROLES)}: prepare the data again")
    for name, (other, theirs) in others:
        for what, differs in (
            ("tokenizer", theirs["tokenizer"]["fingerprint"] != ours["tokenizer"]["fingerprint"]),
            ("template or --conditions", theirs["template"] | {"context": 0} != ours["template"] | {"context": 0}),
        ):
            if differs:
                raise ConfigError(
                    f"data.mix.{name} ({other}): prepared with another {what} than data.mix.{first} ({path}): prepare "
                    "both with the same base and template"
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
        members = np.flatnonzero(class_ids == names.index(name))
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(members))
        kept[members[order[round(share * len(members)) :]]] = False
    return np.flatnonzero(kept).astype(np.int32 if len(kept) < 1 << 31 else np.int64)
