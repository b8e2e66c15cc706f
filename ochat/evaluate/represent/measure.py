"""Measure how far apart the classes lie in one model's hidden states, in every view.

row = measure(
    load, compared, sample, "GPT4", tokenizer, view="own_all", distance="cosine", num_permutations=200, seed=0
)

A conversation is the mean over its tokens of the last layer's hidden states, after the final norm: the states that the
head multiplies, transformers' `hidden_states[-1]` (Granite's are scaled, which no number here depends on). Letters: T
packed tokens, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ochat.console import bar
from ochat.data.batch import Example
from ochat.evaluate.represent.compared import ComparedModel, Sample
from ochat.evaluate.represent.probe import probe
from ochat.evaluate.swap import passes
from ochat.model.transformer import Transformer, pack_ids
from ochat.text.tokenizer import Tokenizer

Distance = Literal["cosine", "euclidean"]
Floats = NDArray[np.float32]
NEIGHBOURS = 15  # UMAP's own default
TOKENS = ("all", "answers")


def measure(
    load: Callable[[], Transformer],
    compared: ComparedModel,
    sample: Sample,
    one_prefix: str,
    tokenizer: Tokenizer,
    *,
    view: str,
    distance: Distance,
    num_permutations: int,
    seed: int,
) -> dict[str, Any]:
    """One model's numbers in each view, and the `points` of `view` in two dimensions, as plain data.

    `load` gives the model, which is freed before anything is computed from its states.
    """
    own, one = sample.written(one_prefix, compared.template, tokenizer)
    with bar(f"{compared.label}: states", len(sample.labels) * (1 + compared.names_classes)) as advance:
        states = views(load(), own, one if compared.names_classes else None, advance)
    row: dict[str, Any] = {"label": compared.label, "source": str(compared.source), "template": compared.template.name}
    row |= {"names_classes": compared.names_classes, "views": {}}
    with bar(f"{compared.label}: probes and map", len(states) + 1) as advance:
        for name, found in states.items():
            row["views"][name] = numbers(found, sample, distance, num_permutations, seed)
            advance(1)
        points = {"pca": pca(states[view])[0], "umap": umap(states[view], distance, seed)}
    row["silhouette_umap"] = silhouette(points["umap"], sample.labels, "euclidean")
    return row | {"points": {name: found.tolist() for name, found in points.items()}}


def views(
    model: Transformer, own: Sequence[Example], one: Sequence[Example] | None, advance: Callable[[int], object]
) -> dict[str, Floats]:
    """The sample's states (n, H) in each view: under which prefixes a conversation is read (its own, or one for all;
    None: prefixes name no class), and over which of its tokens the mean is taken. Costs: a pass for each prefix."""
    of_own = pooled(model, own, advance)
    of_one = of_own if one is None else pooled(model, one, advance)
    found = {f"{prefix}_{name}": of[name] for prefix, of in (("own", of_own), ("one", of_one)) for name in TOKENS}
    return found | {"words": words(model, own)}


@torch.no_grad()
def pooled(model: Transformer, examples: Sequence[Example], advance: Callable[[int], object]) -> dict[str, Floats]:
    """{"all": means over all tokens, "answers": over the tokens of weight other than 0}, (n, H) fp32 each, in order.

    Conversations run packed and sorted by length, without the head. Costs: a forward pass of all tokens, 2 n H numbers.
    Raises: DataError for a token id outside the vocabulary.
    """
    states = {tokens: np.empty((len(examples), model.config.hidden_size), np.float32) for tokens in TOKENS}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for run in passes(len(examples[i].input_ids) for i in order):
        places = [order[i] for i in run]
        ids = [examples[i].input_ids.tolist() for i in places]
        hidden = model(*pack_ids(model, ids), lambda hidden, _: hidden)
        # a mean a conversation: sums by index are atomic additions on CUDA, in another order each time
        for place, part in zip(places, hidden.split([len(each) for each in ids]), strict=True):
            answers = torch.from_numpy(np.flatnonzero(examples[place].loss_weights)).to(part.device)
            for name, tokens in (("all", part), ("answers", part[answers])):
                states[name][place] = tokens.float().mean(0).cpu().numpy()
        advance(len(places))
    return states


@torch.no_grad()
def words(model: Transformer, examples: Sequence[Example]) -> Floats:
    """Means of the answers' input embeddings, (n, H) fp32: which words they contain, without order or context."""
    weight = model.embed.weight
    means = []
    for each in examples:
        ids = torch.from_numpy(each.input_ids[each.loss_weights != 0]).to(weight.device)
        means.append(model.embed(ids, torch.float32).mean(0))
    return torch.stack(means).cpu().numpy()


def numbers(states: Floats, sample: Sample, distance: Distance, num_permutations: int, seed: int) -> dict[str, Any]:
    """Silhouette of the states and of their PCA, the PCA's shares of the variance, and the probe."""
    points, explained = pca(states)
    probed = probe(states, sample.labels, sample.prompts, num_permutations=num_permutations, seed=seed)
    return {
        "silhouette": silhouette(states, sample.labels, distance),
        "silhouette_pca": silhouette(points, sample.labels, "euclidean"),
        "pca_explained": explained,
        "probe": probed,
    }


def pca(states: Floats) -> tuple[Floats, list[float]]:
    """The first two principal components (n, 2) of states (n, H), and the share of the variance that each explains."""
    from sklearn.decomposition import PCA

    model = PCA(2, svd_solver="full").fit(states)
    return model.transform(states).astype(np.float32), model.explained_variance_ratio_.tolist()


def umap(states: Floats, distance: Distance, seed: int) -> Floats:
    """UMAP's (n, 2) of states (n, H). Costs: seconds for the first call, which compiles."""
    from umap import UMAP

    neighbours = min(NEIGHBOURS, len(states) - 1)
    model = UMAP(n_neighbors=neighbours, metric=distance, random_state=seed % 2**32, n_jobs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal points, and how its libraries call each other: nothing to act on
        return np.asarray(model.fit_transform(states), np.float32)


def silhouette(points: Floats, labels: NDArray[np.int64], distance: Distance) -> float:
    """Mean over points (n, d) of (b - a) / max(a, b): a is the mean distance to the others of its class, b to those of
    the nearest other class. 1: classes lie apart, 0: mixed. Costs: n^2 distances."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(points, labels, metric=distance))
