"""Measure how far apart the classes lie in one model's hidden states, in every view.

row = measure(
    load, compared, sample, "GPT4", tokenizer, view="own_all", distance="cosine", num_permutations=200, seed=0
)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ochat.console import bar
from ochat.evaluate.represent import hidden_states
from ochat.evaluate.represent.compared_models import ComparedModel
from ochat.evaluate.represent.probe import probe
from ochat.evaluate.represent.sample import Sample
from ochat.model.transformer import Transformer
from ochat.text.tokenizer import Tokenizer

Distance = Literal["cosine", "euclidean"]
Floats = NDArray[np.float32]
NEIGHBOURS = 15  # UMAP's own default


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
    with bar(f"{compared.label}: states", len(sample.labels) * (1 + compared.names_classes)) as advance:
        states = hidden_states.views(load(), compared, sample, one_prefix, tokenizer, advance)
    row: dict[str, Any] = {"label": compared.label, "source": str(compared.source), "template": compared.template.name}
    row |= {"names_classes": compared.names_classes, "views": {}}
    with bar(f"{compared.label}: probes and map", len(hidden_states.VIEWS) + 1) as advance:
        for name in hidden_states.VIEWS:
            row["views"][name] = numbers(states[name], sample, distance, num_permutations, seed)
            advance(1)
        points = {"pca": pca(states[view])[0], "umap": umap(states[view], distance, seed)}
    row["silhouette_umap"] = silhouette(points["umap"], sample.labels, "euclidean")
    return row | {"points": {name: found.tolist() for name, found in points.items()}}


def numbers(states: Floats, sample: Sample, distance: Distance, num_permutations: int, seed: int) -> dict[str, Any]:
    """Silhouette of the states and of their PCA, the PCA's shares of the variance, and the probe."""
    points, explained = pca(states)
    probed = probe(states, sample.labels, sample.prompts, num_permutations=num_permutations, seed=seed)
    return {
        "silhouette": silhouette(states, sample.labels, distance),
        "silhouette_pca": silhouette(points, sample.labels, "euclidean"),
        "pca_explained": explained,
        "probe": asdict(probed) | {"interval": list(probed.interval)},
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
