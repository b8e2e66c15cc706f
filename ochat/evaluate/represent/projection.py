"""Project hidden states to two dimensions, and measure how far apart classes lie.

points, explained = pca(states);  points = umap(states, "cosine", seed=0);  silhouette(points, labels, "euclidean")
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Distance = Literal["cosine", "euclidean"]
Floats = NDArray[np.float32]
NEIGHBOURS = 15  # UMAP's own default


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
