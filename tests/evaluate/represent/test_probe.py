"""The probe is logistic regression on prompts it never saw, its p-values keep what they promise, distances on made-up
states are those known by hand: pytest tests/evaluate/represent/test_probe.py"""

from __future__ import annotations

import numpy as np
import pytest

from ochat.evaluate import intervals
from ochat.evaluate.represent import measure
from ochat.evaluate.represent import probe as probes

stats = pytest.importorskip("scipy.stats", reason="the extra `report` is not installed")
pytest.importorskip("sklearn")


def made_up(seed, n=60, hidden=8, classes=2, apart=0.0, per_prompt=1):
    """States, labels and prompts: Gaussian, class means `apart` deviations from each other on the first axes."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    prompts = np.arange(n) // per_prompt
    states = random.normal(size=(n, hidden)) + 5
    states[np.arange(n), labels] += apart
    return states.astype(np.float32), labels, prompts


@pytest.mark.parametrize(("n", "hidden", "classes"), [(80, 12, 2), (40, 60, 2), (90, 10, 3)])
def test_predictions_are_those_of_the_minimum(n, hidden, classes):
    """Of the penalised loss on all other folds, found by Newton's method in float64."""
    states, labels, _ = made_up(1, n, hidden, classes, apart=1.5)
    random = np.random.default_rng(0)
    many = np.stack([labels, random.permutation(labels)])
    folds = random.permutation(np.arange(n) % probes.FOLDS)
    found = probes.out_of_fold(states, many, folds)
    for fold in range(probes.FOLDS):
        train, test = probes.standardised(states[folds != fold], states[folds == fold])
        for row, predicted in zip(many, found, strict=True):
            names = range(classes) if classes > 2 else [1]
            scores = np.stack([test @ minimum(train, row[folds != fold] == name) for name in names], axis=1)
            scores = scores if classes > 2 else np.column_stack([np.zeros(len(test)), scores])
            top = np.sort(scores, axis=1)
            is_clear = top[:, -1] - top[:, -2] > 1e-3
            assert is_clear.sum() > len(test) / 2
            assert (scores.argmax(1) == predicted[folds == fold])[is_clear].all()


def minimum(x, targets):
    """argmin of sum log(1 + e^s) - t s + PENALTY |w|^2 / 2, s = x w."""
    x, weights = x.astype(np.float64), np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-(x @ weights)))
        hessian = (x.T * (p * (1 - p))) @ x + probes.PENALTY * np.eye(len(weights))
        weights -= np.linalg.solve(hessian, x.T @ (p - targets) + probes.PENALTY * weights)
    return weights


def test_states_are_standardised_by_the_training_folds():
    states, _, _ = made_up(0, 40, 16)
    states[:, 3] = 7  # says nothing, and has no deviation
    train, test = probes.standardised(states[:30], states[30:])
    deviations = np.where(np.arange(16) == 3, 1, states[:30].std(0)) * 4
    for found, of in ((train, states[:30]), (test, states[30:])):
        assert found.dtype == np.float32 and (found[:, -1] == 1).all() and (found[:, 3] == 0).all()
        assert found[:, :-1] == pytest.approx((of - states[:30].mean(0)) / deviations, abs=1e-5)


def test_states_that_tell_the_prompt_do_not_tell_the_class():
    """Each prompt has its own place and one class: without grouping, a neighbour on the other side would give it away;
    the rule may not be better than chance, and a test that took each answer for an independent one would say it is."""
    random = np.random.default_rng(3)
    prompts = np.repeat(np.arange(20), 6)
    labels = np.repeat(random.permutation(np.arange(20) % 2), 6)
    states = (random.normal(size=(20, 50))[prompts] + 0.1 * random.normal(size=(120, 50))).astype(np.float32)
    found = probes.probe(states, labels, prompts, num_permutations=99, seed=0)
    assert found["accuracy"] < 0.8 and found["p_value"] > 0.02
    split = np.random.default_rng(0).permutation(np.arange(120) % probes.FOLDS)
    assert (probes.out_of_fold(states, labels[None], split)[0] == labels).mean() == 1  # what grouping keeps from us


@pytest.mark.parametrize("per_prompt", [2, 3])
def test_p_values_of_random_labels_are_uniform(per_prompt):
    """Where states say nothing about the class, but answers to one prompt are alike and share their class (3), or are
    one of each class (2): at most a share p of p-values is up to p, and they are not all large."""
    values = []
    for seed in range(16):
        states, labels, prompts = made_up(seed, 48, 6, per_prompt=per_prompt)
        random = np.random.default_rng(seed)
        states += 3 * random.normal(size=(48, 6)).astype(np.float32)[prompts]
        if per_prompt == 3:
            labels = random.permutation(np.arange(16) % 2)[prompts]
        values.append(probes.probe(states, labels, prompts, num_permutations=19, seed=seed)["p_value"])
    assert min(values) >= 1 / 20
    assert stats.kstest(values, "uniform", alternative="greater").pvalue > 0.01  # not too many small ones
    assert np.mean(np.array(values) <= 0.5) > 0.2


@pytest.mark.parametrize(("n", "classes", "count", "chance"), [(60, 2, 99, (0.35, 0.6)), (90, 3, 19, (0.2, 0.45))])
def test_separated_classes_have_the_smallest_p_value_there_is(n, classes, count, chance):
    found = probes.probe(*made_up(0, n, classes=classes, apart=8), num_permutations=count, seed=0)
    assert (found["accuracy"], found["p_value"]) == (1.0, 1 / (1 + count)) and chance[0] < found["permuted"] < chance[1]
    assert found["interval"] == [pytest.approx(1 / (1 + intervals.Z**2 / n)), 1]


def test_what_no_permutation_can_change_has_a_p_value_of_one():
    """Both answers to a prompt look the same: one of them is right for any prediction."""
    states, labels, prompts = made_up(0, per_prompt=2)
    found = probes.probe(states[prompts], labels, prompts, num_permutations=19, seed=0)
    assert (found["accuracy"], found["permuted"], found["p_value"]) == (0.5, 0.5, 1.0)


def test_permuted_labels_keep_prompts_and_folds_together():
    random = np.random.default_rng(0)
    prompts = np.sort(random.integers(0, 40, size=120))
    labels = random.integers(0, 3, size=120)
    folds = probes.folds_of(labels, prompts, 0)
    drawn = probes.permutations(labels, prompts, folds, 200, seed=1)
    assert drawn.shape == (200, 120) and not (drawn == labels).all(1).any()
    sizes = np.bincount(prompts)

    def lists(of):  # what each fold's prompts of each size have: which classes how often
        return sorted(
            (folds[prompts == p][0], sizes[p], tuple(np.bincount(of[prompts == p], minlength=3))) for p in set(prompts)
        )

    assert all(lists(row) == lists(labels) for row in drawn)
    assert (drawn == probes.permutations(labels, prompts, folds, 200, seed=1)).all()


def test_the_interval_is_wilsons_of_prompts():
    alone, pairs = np.arange(50), np.arange(100) // 2
    wanted = stats.binomtest(40, 50).proportion_ci(0.95, method="wilson")
    assert probes.wilson(0.8, alone) == probes.wilson(0.8, pairs) == pytest.approx(tuple(wanted), abs=1e-6)
    low, high = probes.wilson(0.8, np.append(alone, np.full(50, 7)))  # half of all answers are to one prompt
    assert low < wanted.low and high > wanted.high


@pytest.mark.slow  # UMAP takes twenty seconds to compile
def test_maps_keep_two_heaps_apart_and_are_the_same_by_seed():
    pytest.importorskip("umap")
    states, labels, _ = made_up(0, 60, 30, apart=12)
    points, explained = measure.pca(states)
    assert measure.silhouette(points, labels, "euclidean") > 0.7 and explained[0] > 0.5 > explained[1]
    found = measure.umap(states, "euclidean", seed=1)
    assert found.shape == (60, 2) and measure.silhouette(found, labels, "euclidean") > 0.7
    assert (found == measure.umap(states, "euclidean", seed=1)).all()
