"""Measure whether a linear rule can read the class from the hidden states: logistic regression on unseen prompts.

    found = probe(states, labels, prompts, num_permutations=200, seed=0);  found["accuracy"], found["p_value"]

No fold splits a prompt (scikit-learn's StratifiedGroupKFold): two answers to one prompt are alike for a reason that is
not their class. States are standardised by the training folds and divided by sqrt(H), so that the penalty |w|^2 / 2
against the summed loss has the same strength at every width (on standardised states: C = 1 / H).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.evaluate import intervals

FOLDS = 5
PENALTY = 1.0
TOLERANCE, MAX_STEPS = 1e-5, 500  # of the solver
Floats = NDArray[np.float32]


def probe(
    states: Floats, labels: NDArray[np.int64], prompts: NDArray[np.int64], *, num_permutations: int, seed: int
) -> dict[str, Any]:
    """The probe of states (n, H) with labels (n,) from 0 on, answers to prompts (n,), and its permutation test.

    `accuracy`: the share of conversations that a rule fitted without their prompts classifies correctly; `interval`;
    `p_value`: (1 + permutations at least as accurate) / (1 + permutations); `permuted`: mean accuracy under permuted
    labels.
    Costs: an SVD of (n, H) and 1 + num_permutations fits of (n, min(n, H)) for each fold.
    """
    folds = folds_of(labels, prompts, seed)
    many = np.vstack([labels, permutations(labels, prompts, folds, num_permutations, seed)])
    accuracies = (out_of_fold(states, many, folds) == many).mean(1)
    at_least = int((accuracies[1:] >= accuracies[0]).sum())
    return {
        "accuracy": float(accuracies[0]),
        "interval": list(wilson(float(accuracies[0]), prompts)),
        "p_value": (1 + at_least) / (1 + num_permutations),
        "permuted": float(accuracies[1:].mean()),
    }


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
    """The predicted classes (m, n) of each conversation by m probes, fitted to labels (m, n) on all other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=1 / PENALTY, fit_intercept=False, tol=TOLERANCE, max_iter=MAX_STEPS)
    model = model if labels.max() < 2 else OneVsRestClassifier(model)
    found = np.empty_like(labels)
    for fold in range(FOLDS):
        held_out = folds == fold
        train, test = standardised(states[~held_out], states[held_out])
        # a rotation into the principal axes changes no fit, and min(n, H) axes are enough
        u, s, axes = np.linalg.svd(train, full_matrices=False)
        train, test = u * s, test @ axes.T
        with threadpool_limits(1):  # fits are small: threads cost more than they bring
            for row, targets in enumerate(labels[:, ~held_out]):
                is_one = (targets == targets[0]).all()  # where one fold holds all other classes
                found[row, held_out] = targets[0] if is_one else np.asarray(model.fit(train, targets).predict(test))
    return found


def standardised(train: Floats, test: Floats) -> tuple[Floats, Floats]:
    """Both by the mean and deviation of `train`, over sqrt(H), with a last column of ones."""
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > 0, deviation, 1) * np.sqrt(train.shape[1])
    return tuple(np.column_stack([(x - mean) / scale, np.ones(len(x))]).astype(np.float32) for x in (train, test))  # type: ignore[return-value]


def wilson(share: float, prompts: NDArray[np.int64]) -> tuple[float, float]:
    """The score interval of a share of conversations, as if answers to one prompt were one observation: n is the
    number of prompts (of uneven ones, fewer: Kish's (sum m)^2 / sum m^2). Right, or too wide, never narrow at 1."""
    sizes = np.bincount(prompts)
    return intervals.wilson(share, float(sizes.sum() ** 2 / (sizes**2).sum()))


def _blocks(prompts: NDArray[np.int64], folds: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Places (num prompts, answers to each) of the prompts of one fold with equally many answers."""
    order = np.argsort(prompts, kind="stable")
    by_prompt = np.split(order, np.flatnonzero(np.diff(prompts[order])) + 1)
    blocks: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for places in by_prompt:
        blocks.setdefault((int(folds[places[0]]), len(places)), []).append(places)
    return [np.stack(block) for block in blocks.values()]
