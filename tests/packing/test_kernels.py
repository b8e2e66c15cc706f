"""Laws of the packer's kernels, where the plan alone would not show them: pytest tests/packing/test_kernels.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.packing.kernels import UNASSIGNED, assign_balanced, first_fit_decreasing, rebalance

BUDGET = 32
PAIRS = st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0, 9, width=32)), max_size=40)


def arrays(pairs):
    lengths = np.array([p[0] for p in pairs], np.int32)
    return lengths, np.array([p[1] for p in pairs], np.float32), np.argsort(-lengths, kind="stable")


def totals(bin_of, values, num_bins):
    return np.bincount(bin_of, weights=values, minlength=num_bins)


def bins_of(members, counts, num_sequences):
    """bin_of again, from sequences bin by bin."""
    bin_of = np.full(num_sequences, UNASSIGNED)
    bin_of[members] = np.repeat(np.arange(len(counts)), counts)
    return bin_of


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 0.5, 30.0]))
def test_dealing_places_all_that_the_limit_lets(pairs, num_bins, limit, cost_priority):
    lengths, extra, longest_first = arrays(pairs[: num_bins * limit])
    bin_of = assign_balanced(lengths, extra, longest_first, num_bins, limit, cost_priority)
    assert ((bin_of >= 0) & (bin_of < num_bins)).all()
    assert (np.bincount(bin_of, minlength=num_bins) <= limit).all()
    even = assign_balanced(lengths, extra * 0, longest_first, num_bins, len(pairs) + 1, 0.0)
    tokens = totals(even, lengths, num_bins)
    assert tokens.max() - tokens.min() <= lengths.max(initial=0), "without costs, bins are a sequence apart at most"


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.integers(1, 12), st.integers(1, 6))
def test_tight_bins_are_within_budget_and_limit(pairs, num_bins, limit):
    lengths, _, longest_first = arrays(pairs)
    bin_of = first_fit_decreasing(lengths, longest_first, num_bins, BUDGET, limit)
    placed = bin_of != UNASSIGNED
    assert (bin_of[placed] < num_bins).all()
    tokens, counts = totals(bin_of[placed], lengths[placed], num_bins), np.bincount(bin_of[placed], minlength=num_bins)
    assert (tokens <= BUDGET).all() and (counts <= limit).all()
    for length in lengths[~placed]:
        assert ((tokens + length > BUDGET) | (counts == limit)).all(), "left out although a bin has room"


@settings(max_examples=300, deadline=None)
@given(PAIRS, st.integers(1, 8), st.integers(2, 9), st.booleans(), st.floats(0, 2), st.integers(0, 6))
def test_evening_keeps_every_sequence_budget_and_limit(pairs, num_bins, limit, is_strict, slope, num_pool):
    """Every bin ends within the budget from any start; only the pool and what is dropped for that stays out."""
    lengths, extra, _ = arrays(pairs)
    own = max(len(pairs) - num_pool, 0)
    longest_first = np.argsort(-lengths[:own], kind="stable")
    bin_of = np.full(len(pairs), UNASSIGNED, np.int32)
    if is_strict:
        bin_of[:own] = first_fit_decreasing(lengths[:own], longest_first, num_bins, BUDGET, limit)
    else:
        fitting = longest_first[: num_bins * limit]
        in_order = np.arange(len(fitting))
        bin_of[fitting] = assign_balanced(lengths[fitting], extra[fitting], in_order, num_bins, limit, 0.0)
    members, counts = rebalance(lengths, extra, bin_of, num_bins, BUDGET, limit, slope, 1.0, is_strict)
    assert len(set(members.tolist())) == len(members) == counts.sum()
    assert len(counts) == num_bins and (counts <= limit).all()
    after = bins_of(members, counts, len(pairs))
    placed = after != UNASSIGNED
    assert (totals(after[placed], lengths[placed], num_bins) <= BUDGET).all()
    if is_strict:
        assert (placed == (bin_of != UNASSIGNED)).all(), "none is put back if no bin is over"


@pytest.mark.parametrize("is_strict", [False, True])
def test_evening_evens_costs_of_equal_lengths(is_strict):
    """Bins full to the last token: only sequences of one length can change places, and that is enough."""
    rng = np.random.default_rng(0)
    lengths = np.full(64, 8, np.int32)
    extra = rng.normal(0, 4, 64).astype(np.float32)
    bin_of = np.repeat(np.arange(16), 4)[np.argsort(np.argsort(extra))].astype(np.int32)  # as uneven as can be
    members, counts = rebalance(lengths, extra, bin_of, 16, BUDGET, 9, 1.0, 1.0, is_strict)
    before = totals(bin_of, extra, 16)
    after = totals(bins_of(members, counts, 64), extra, 16)
    assert (counts == 4).all()
    assert before.max() - before.mean() > 10
    assert after.max() - after.mean() <= 1.5


def test_what_is_over_the_budget_is_exchanged_with_the_pool_before_it_is_dropped():
    lengths = np.array([20, 14, 12, 3], np.int32)  # 34 of 32; 12 for 14 fills the bin
    bin_of = np.array([0, 0, UNASSIGNED, UNASSIGNED], np.int32)
    members, counts = rebalance(lengths, np.zeros(4, np.float32), bin_of, 1, BUDGET, 4, 0.0, 1.0, False)
    assert sorted(members.tolist()) == [0, 2] and counts.tolist() == [2]
