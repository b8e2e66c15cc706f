"""Intervals hold the truth as often as they say, where tokens of a conversation are alike; pairs are surer than
singles: pytest tests/evaluate/test_swap_report.py"""

from __future__ import annotations

import json

import numpy as np
import pytest

from ochat.evaluate import swap
from ochat.evaluate.swap import Sums

CONDITIONS = ("own", "other")
TRUE_NLL = 2.0


def draw(seed: int, count: int) -> Sums:
    """`count` conversations of skewed lengths, each with a difficulty that all of its tokens share, a gamma of mean
    TRUE_NLL; the other prefix costs 0.1 more a token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, count) ** 2 // 200 + 1
    difficulty = rng.gamma(4.0, TRUE_NLL / 4, count)
    nll = tokens * difficulty
    other = nll + tokens * (0.1 + rng.normal(0, 0.05, count))
    correct = rng.binomial(tokens, np.exp(-difficulty))
    return Sums(tokens, np.stack([nll, other], 1), np.stack([correct, correct], 1))


def cells(sums: Sums) -> dict:
    return swap.summarise({"own": sums}, CONDITIONS)["own"]["prefixes"]


def test_an_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(swap, "RESAMPLES", 400)
    ends = [cells(draw(seed, 100))["own"]["nll_interval"] for seed in range(300)]
    # three standard errors of 300 draws are 0.038; the percentiles of 100 fall a bit short
    assert 0.90 <= np.mean([low <= TRUE_NLL <= high for low, high in ends]) <= 0.98


def test_tokens_are_no_independent_draws():
    """Long conversations make the interval wider than their tokens alone would, by the root of what they share."""
    sums = draw(0, 200)
    low, high = cells(sums)["own"]["nll_interval"]
    spread = np.repeat(sums.nll[:, 0] / sums.tokens, sums.tokens).std() / np.sqrt(sums.tokens.sum())
    assert (high - low) / 2 > 4 * 1.96 * spread


def test_the_difference_of_two_prefixes_is_paired():
    found = cells(draw(1, 100))
    (low, high), (own_low, own_high) = found["other"]["nll_above_own_interval"], found["own"]["nll_interval"]
    assert low < 0.1 < high and (high - low) < (own_high - own_low) / 5
    assert found["own"]["nll_above_own"] == 0 and found["own"]["nll_above_own_interval"] == [0, 0]


def test_means_are_over_tokens_and_belong_together():
    sums = Sums(np.array([1, 3]), np.array([[4.0, 0.0], [0.0, 8.0]]), np.array([[1, 0], [2, 3]]))
    found = cells(sums)
    assert [found[name]["nll"] for name in CONDITIONS] == [1.0, 2.0]
    assert [found[name]["accuracy"] for name in CONDITIONS] == [0.75, 0.75]
    assert found["other"]["perplexity"] == pytest.approx(np.exp(2)) and found["other"]["nll_above_own"] == 1.0
    ends = found["other"]
    assert np.log(ends["perplexity_interval"]) == pytest.approx(ends["nll_interval"], rel=1e-2, abs=1e-6)


def test_the_same_matrix_gives_the_same_record_and_one_conversation_no_interval():
    sums = draw(2, 30)
    assert json.dumps(cells(sums)) == json.dumps(cells(sums))
    assert cells(draw(2, 1))["own"]["nll_interval"] is None
    other = swap.summarise({"stranger": sums}, CONDITIONS)["stranger"]["prefixes"]["own"]
    assert other["nll_above_own"] is None and other["nll_above_own_interval"] is None


def test_none_or_all_exact_leaves_room_for_the_others():
    """Of 20 conversations none exact, the truth may be 10 %: it leaves none in one of eight draws."""
    tokens, nll = np.full(20, 3), np.ones((20, 2))
    some = np.array([[3, 0]] * 20)  # all under one prefix, none under the other
    found = cells(Sums(tokens, nll, some))
    assert (found["own"]["exact"], found["other"]["exact"]) == (1.0, 0.0)
    assert found["own"]["exact_interval"] == pytest.approx([0.8389, 1.0], abs=1e-4)  # Wilson's, as printed by others
    assert found["other"]["exact_interval"] == pytest.approx([0.0, 0.1611], abs=1e-4)
