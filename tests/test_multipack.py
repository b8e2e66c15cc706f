"""Laws of the packer, over random lengths and the odd ones: pytest tests/test_multipack.py"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.multipack import plan
from ochat.errors import ConfigError, DataError

BUDGET = 64
LENGTHS = st.lists(st.integers(1, BUDGET), max_size=300)


def make(lengths, bins_per_step=4, seed=0, epoch=0, budget=BUDGET, **options):
    return plan(lengths, token_budget=budget, bins_per_step=bins_per_step, seed=seed, epoch=epoch, **options)


def chat_lengths(count, longest=8192, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(6, 1, count), 8, longest).astype(np.int64)


def check_laws(packed, lengths, max_sequences=None):
    """Every sequence once, no bin over budget or count, whole steps, sums that are the bins' own."""
    assert sorted(packed.indices.tolist()) == list(range(len(lengths)))
    assert packed.indices.dtype == packed.bin_offsets.dtype == np.int64
    assert len(packed.bin_offsets) == packed.num_steps * packed.bins_per_step + 1
    assert packed.bin_offsets[0] == 0 and packed.bin_offsets[-1] == len(lengths)
    assert (np.diff(packed.bin_offsets) >= 0).all()
    for b in range(packed.num_steps * packed.bins_per_step):
        tokens = sum(lengths[i] for i in packed.bin(b))
        assert tokens <= packed.token_budget
        assert packed.bin_tokens[b] == tokens
        assert max_sequences is None or len(packed.bin(b)) <= max_sequences


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.none() | st.integers(1, 5), st.booleans())
def test_every_sequence_once_and_no_bin_over_budget(lengths, bins_per_step, seed, epoch, max_sequences, with_costs):
    costs = [length**2 + 1.0 for length in lengths] if with_costs else None
    packed = make(lengths, bins_per_step, seed, epoch, max_sequences=max_sequences, costs=costs)
    check_laws(packed, lengths, max_sequences)
    steps = packed.bin_tokens.reshape(packed.num_steps, bins_per_step).sum(axis=1)
    assert (steps > 0).all(), "no step is empty"


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(1, 9))
def test_the_same_input_gives_the_same_plan(lengths, bins_per_step):
    first, second = make(lengths, bins_per_step), make(list(lengths), bins_per_step)
    assert first.indices.tolist() == second.indices.tolist()
    assert first.bin_offsets.tolist() == second.bin_offsets.tolist()


def test_another_epoch_and_another_seed_give_another_order():
    lengths = chat_lengths(500, BUDGET)
    orders = {tuple(make(lengths, seed=s, epoch=e).indices) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(orders) == 4


@pytest.mark.parametrize(
    "lengths, steps",
    [
        ([], 0),
        ([1], 1),
        ([BUDGET], 1),
        ([BUDGET] * 4, 1),
        ([BUDGET] * 9, 3),
        ([16] * 16, 1),
        ([16] * 17, 2),
        ([1, 2], 1),
    ],
    ids=[
        "empty",
        "one",
        "one full",
        "one full step",
        "partial last step",
        "all equal",
        "one too many",
        "fewer than bins",
    ],
)
def test_small_and_extreme_sets(lengths, steps):
    packed = make(lengths)
    check_laws(packed, lengths)
    assert packed.num_steps == steps
    room = steps * 4 * BUDGET
    assert packed.efficiency() == (sum(lengths) / room if room else 1.0)
    assert len(packed.cost_imbalance()) == max(steps - 1, 0)


def test_empty_bins_come_last():
    filled = make([BUDGET] * 9).bin_tokens > 0
    assert filled.tolist() == [True] * 9 + [False] * 3


@pytest.mark.parametrize(
    "bins, budget, longest", [(8, 32768, 8192), (1, 32768, 8192), (64, 16384, 4096), (3, 8192, 8192)]
)
def test_steps_reach_the_floor_on_chat_lengths(bins, budget, longest):
    lengths = chat_lengths(30_000, longest)
    packed = make(lengths, bins, budget=budget)
    floor = math.ceil(lengths.sum() / (bins * budget))
    assert floor <= packed.num_steps <= math.ceil(floor * 1.005)
    assert packed.efficiency() == lengths.sum() / (packed.num_steps * bins * budget)


def test_a_bin_is_not_left_to_the_longest():
    """Steps are a fair sample: their mean length spreads at most twice as much as that of random steps."""
    lengths = chat_lengths(60_000)
    packed = make(lengths, 8, budget=32768)
    ends = packed.bin_offsets[::8]
    means = np.add.reduceat(lengths[packed.indices], ends[:-1]) / np.diff(ends)
    assert means[:-1].var() <= 2 * lengths.var() / (len(lengths) / packed.num_steps)


def test_bins_come_in_no_order_of_length():
    """Lengths up to the budget, which first-fit decreasing packs, longest bins first: the plan must not keep that."""
    lengths = np.random.default_rng(0).integers(1, BUDGET + 1, 4000)
    packed = make(lengths, 1)
    longest = np.maximum.reduceat(lengths[packed.indices], packed.bin_offsets[:-1])
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.2


def test_costs_even_the_bins_of_a_step():
    lengths = chat_lengths(20_000)
    costs = lengths + 1e-3 * lengths.astype(float) ** 2
    with_costs, without = make(lengths, 8, budget=32768, costs=costs), make(lengths, 8, budget=32768)
    worst = with_costs.cost_imbalance()
    sums = np.add.reduceat(costs[without.indices], without.bin_offsets[:-1]).reshape(-1, 8)[:-1]
    assert with_costs.num_steps == without.num_steps
    assert (worst >= 1).all() and worst.mean() < 1.1
    assert worst.mean() < (sums.max(axis=1) / sums.mean(axis=1)).mean()


@pytest.mark.parametrize("wrong", [0, -3, BUDGET + 1])
def test_a_length_that_no_bin_holds_is_named(wrong):
    with pytest.raises(DataError, match=rf"sequence 2 has {wrong} tokens"):
        make([1, BUDGET, wrong, 5])


@pytest.mark.parametrize("lengths", [[1.5, 2.0], [[1, 2], [3, 4]]])
def test_lengths_must_be_one_list_of_whole_numbers(lengths):
    with pytest.raises(DataError, match="whole numbers"):
        make(lengths)


@pytest.mark.parametrize(
    "costs, message", [([1.0], "shape"), ([1.0, math.nan], "sequence 1"), ([-1.0, 1.0], "sequence 0")]
)
def test_impossible_costs_are_named(costs, message):
    with pytest.raises(DataError, match=message):
        make([1, 2], costs=costs)


@pytest.mark.parametrize(
    "setting",
    [{"budget": 0}, {"bins_per_step": 0}, {"seed": -1}, {"epoch": -1}, {"max_sequences": 0}],
    ids=lambda setting: next(iter(setting)),
)
def test_impossible_settings_are_named(setting):
    name = {"budget": "token_budget"}.get(next(iter(setting)), next(iter(setting)))
    with pytest.raises(ConfigError, match=name):
        make([1, 2], **setting)


def test_costs_of_nothing_are_even():
    assert (make([BUDGET] * 12, costs=[0.0] * 12).cost_imbalance() == 1).all()
