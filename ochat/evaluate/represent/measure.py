"""Measure how far apart the classes lie in one model's hidden states, in every view.

row = measure(
    load, compared, sample, "GPT4", tokenizer, view="own_all", distance="cosine", num_permutations=200, seed=0
)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.console import bar
from ochat.evaluate.represent import hidden_states, projection
from ochat.evaluate.represent.compared_models import ComparedModel
from ochat.evaluate.represent.probe import probe
from ochat.evaluate.represent.projection import Distance
from ochat.evaluate.represent.sample import Sample
from ochat.model.transformer import Transformer
from ochat.text.tokenizer import Tokenizer


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
        points = {"pca": projection.pca(states[view])[0], "umap": projection.umap(states[view], distance, seed)}
    row["silhouette_umap"] = projection.silhouette(points["umap"], sample.labels, "euclidean")
    return row | {"points": {name: found.tolist() for name, found in points.items()}}


def numbers(
    states: NDArray[np.float32], sample: Sample, distance: Distance, num_permutations: int, seed: int
) -> dict[str, Any]:
    """Silhouette of the states and of their PCA, the PCA's shares of the variance, and the probe."""
    points, explained = projection.pca(states)
    probed = probe(states, sample.labels, sample.prompts, num_permutations=num_permutations, seed=seed)
    return {
        "silhouette": projection.silhouette(states, sample.labels, distance),
        "silhouette_pca": projection.silhouette(points, sample.labels, "euclidean"),
        "pca_explained": explained,
        "probe": asdict(probed) | {"interval": list(probed.interval)},
    }
