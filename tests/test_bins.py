"""Laws of the packer's compiled loops, where the plan alone would not show them: pytest tests/test_bins.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.bins import NOWHERE, even_costs, pack_ffd, pack_lpt

BUDGET = 32
SIZES = st.lists(st.integers(1, BUDGET), max_size=40)


def totals(bin_of, values, num_bins):
    return np.bincount(bin_of, weights=values, minlength=num_bins)


@pytest.mark.parametrize("pack", [pack_lpt, pack_ffd])
@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, num_bins=st.integers(1, 12), limit=st.integers(1, 6))
def test_what_fits_is_within_budget_and_limit(pack, sizes, num_bins, limit):
    sizes = np.array(sizes, np.int64)
    fits, bin_of = pack(sizes, num_bins, BUDGET, limit)
    if not fits:
        assert (bin_of == NOWHERE).any()
        return
    assert ((bin_of >= 0) & (bin_of < num_bins)).all()
    assert (totals(bin_of, sizes, num_bins) <= BUDGET).all()
    assert (np.bincount(bin_of, minlength=num_bins) <= limit).all()


@pytest.mark.parametrize("pack", [pack_lpt, pack_ffd])
@settings(max_examples=100, deadline=None)
@given(sizes=SIZES)
def test_a_bin_per_sequence_always_fits(pack, sizes):
    assert pack(np.array(sizes, np.int64), max(len(sizes), 1), BUDGET, 1)[0]


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, num_bins=st.integers(1, 12))
def test_ffd_fails_only_for_want_of_room(sizes, num_bins):
    """First fit never leaves two bins that are at most half full, so what did not fit was nearly half of the room."""
    fits, _ = pack_ffd(np.array(sizes, np.int64), num_bins, BUDGET, len(sizes) + 1)
    assert fits or 2 * sum(sizes) > (num_bins - 1) * BUDGET


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0, 9)), min_size=1, max_size=40),
    bins_per_step=st.integers(1, 4),
    limit=st.integers(1, 6),
)
def test_evening_costs_keeps_steps_and_budgets_and_never_makes_it_worse(pairs, bins_per_step, limit):
    sizes, costs = np.array([p[0] for p in pairs], np.int64), np.array([p[1] for p in pairs], np.float64)
    num_bins = -(-len(sizes) // bins_per_step) * bins_per_step
    while num_bins > bins_per_step and pack_ffd(sizes, num_bins - bins_per_step, BUDGET, limit)[0]:
        num_bins -= bins_per_step  # as tight as it goes
    _, before = pack_ffd(sizes, num_bins, BUDGET, limit)
    after = even_costs(before, sizes, costs, bins_per_step, BUDGET, limit)
    assert (after // bins_per_step == before // bins_per_step).all()
    assert (totals(after, sizes, num_bins) <= BUDGET).all()
    assert (np.bincount(after, minlength=num_bins) <= limit).all()
    largest = [totals(b, costs, num_bins).reshape(-1, bins_per_step).max(axis=1) for b in (before, after)]
    assert (largest[1] <= largest[0] + 1e-9).all()
