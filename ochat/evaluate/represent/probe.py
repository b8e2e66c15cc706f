"""Can a linear rule read the class off the states? Logistic regression on answers to prompts it never saw.

    found = probe(states, labels, prompts, num_permutations=200, seed=0);  found.accuracy, found.p_value

Folds (scikit-learn's StratifiedGroupKFold) never split a prompt: two answers to one prompt are alike for a reason that
is not their class. States are standardised by the training folds, and divided by sqrt(H), so that the same penalty
|w|^2 / 2 per unit of summed loss weighs alike at every width (on standardised states: C = 1 / H).

The permutation test needs hundreds of such fits that differ in their labels alone. All are solved at once: in the
principal axes of the training states, their Gram matrix is diagonal, S^2; the loss's curvature is nowhere above S^2 / 4
plus the penalty (Boehning 1992); so every step of the accelerated gradient method is two matrix products for all fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ochat.evaluate import proportion

FOLDS = 5
PENALTY = 1.0
TOLERANCE, MAX_STEPS = 1e-3, 500  # of the largest change of a score (a logit) between two steps
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Probe:
    """Of n conversations, each told by a rule that was fitted without its prompt."""

    accuracy: float  # share whose class is told
    interval: tuple[float, float]
    p_value: float  # (1 + permutations at least as accurate) / (1 + permutations)
    permuted: float  # mean accuracy under permuted labels


def probe(
    states: Floats, labels: NDArray[np.int64], prompts: NDArray[np.int64], *, num_permutations: int, seed: int
) -> Probe:
    """The probe of states (n, H) with labels (n,) from 0 on, answers to prompts (n,), and its permutation test.

    Costs: an SVD of (n, H) for each fold, and some dozens of products of (n, min(n, H)) by (.., 1 + permutations).
    """
    folds = folds_of(labels, prompts, seed)
    many = np.vstack([labels, permutations(labels, prompts, folds, num_permutations, seed)])
    accuracies = (out_of_fold(states, many, folds) == many).mean(1)
    at_least = int((accuracies[1:] >= accuracies[0]).sum())
    return Probe(
        accuracy=float(accuracies[0]),
        interval=wilson(float(accuracies[0]), prompts),
        p_value=(1 + at_least) / (1 + num_permutations),
        permuted=float(accuracies[1:].mean()),
    )


def folds_of(labels: NDArray[np.int64], prompts: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each conversation (n,): a prompt in one fold, classes spread alike."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed % 2**32)
    folds = np.empty(len(labels), np.int64)
    for fold, (_, held_out) in enumerate(splitter.split(labels[:, None], labels, prompts)):
        folds[held_out] = fold
    return folds


def permutations(
    labels: NDArray[np.int64], prompts: NDArray[np.int64], folds: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """(count, n) labels as they might as well have been, if they said nothing about the states.

    Answers to one prompt are alike, so single labels are not exchangeable: those of a prompt change places with those
    of another of as many answers, and among its own. And within a fold alone, so that folds stay as even as they are.
    """
    random = np.random.default_rng(seed)
    blocks = _blocks(prompts, folds)
    drawn = np.tile(labels, (count, 1))
    for row in drawn:
        for block in blocks:
            row[block] = random.permuted(labels[block][random.permutation(len(block))], axis=1)
    return drawn


def out_of_fold(states: Floats, labels: NDArray[np.int64], folds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class (m, n) that m probes tell of each conversation, fitted to labels (m, n) on all other folds."""
    num_classes = int(labels.max()) + 1
    found = np.empty_like(labels)
    for fold in range(FOLDS):
        held_out = folds == fold
        train, test = standardised(states[~held_out], states[held_out])
        # one against the rest; of two classes the second against the first says it all
        names = range(num_classes) if num_classes > 2 else (1,)
        targets = np.hstack([(labels[:, ~held_out] == name).T for name in names])
        scores = (test @ fit(train, targets.astype(np.float32))).reshape(held_out.sum(), len(names), -1)
        told = scores.argmax(1) if num_classes > 2 else scores[:, 0] > 0
        found[:, held_out] = told.T
    return found


def standardised(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both by the mean and deviation of `train`, over sqrt(H), with a last column of ones."""
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > 0, deviation, 1) * np.sqrt(train.shape[1])
    return tuple(np.column_stack([(x - mean) / scale, np.ones(len(x))]).astype(np.float32) for x in (train, test))  # type: ignore[return-value]


def fit(x: Floats, targets: Floats) -> Floats:
    """Weights (d, m) of m logistic regressions on x (n, d): argmin sum log(1 + e^s) - t s + PENALTY |w|^2 / 2, where
    s = x w and t = targets (n, m), 0 or 1."""
    from scipy.special import expit

    u, s, axes = np.linalg.svd(x, full_matrices=False)
    z = u * s  # (n, r): x in its principal axes
    curvature = (s**2 / 4 + PENALTY)[:, None]
    slowest = np.sqrt(PENALTY / curvature.max())
    momentum = (1 - slowest) / (1 + slowest)
    weights = ahead = np.zeros((len(s), targets.shape[1]), np.float32)
    scores = np.zeros_like(targets)
    for _ in range(MAX_STEPS):
        gradient = z.T @ (expit(scores) - targets) + PENALTY * ahead
        before, weights = weights, ahead - gradient / curvature
        ahead = weights + momentum * (weights - before)
        last, scores = scores, z @ ahead
        if np.abs(scores - last).max() < TOLERANCE:
            break
    return axes.T @ weights


def wilson(share: float, prompts: NDArray[np.int64]) -> tuple[float, float]:
    """The score interval of a share of conversations, as if answers to one prompt were one observation: n is the
    number of prompts (of uneven ones, fewer: Kish's (sum m)^2 / sum m^2). Right, or too wide, never narrow at 1."""
    sizes = np.bincount(prompts)
    return proportion.wilson(share, float(sizes.sum() ** 2 / (sizes**2).sum()))


def _blocks(prompts: NDArray[np.int64], folds: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places (num prompts, answers to each) of the prompts of one fold with equally many answers."""
    order = np.argsort(prompts, kind="stable")
    by_prompt = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    blocks: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for places in by_prompt:
        blocks.setdefault((int(folds[places[0]]), len(places)), []).append(places)
    return [np.stack(block) for block in blocks.values()]
