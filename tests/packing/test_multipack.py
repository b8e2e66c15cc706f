"""Laws of the packer, over random lengths and the odd ones: pytest tests/packing/test_multipack.py"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.packing.multipack import plan

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


SETS = {  # lengths, steps
    "empty": ([], 0), "one": ([1], 1), "one full": ([BUDGET], 1), "one full step": ([BUDGET] * 4, 1),
    "partial last step": ([BUDGET] * 9, 3), "all equal": ([16] * 16, 1), "one too many": ([16] * 17, 2),
    "fewer than bins": ([1, 2], 1),
}  # fmt: skip


@pytest.mark.parametrize("lengths, steps", SETS.values(), ids=SETS)
def test_small_and_extreme_sets(lengths, steps):
    packed = make(lengths)
    check_laws(packed, lengths)
    filled = (packed.bin_tokens > 0).tolist()
    assert packed.num_steps == steps and filled == sorted(filled, reverse=True), "empty bins come last"
    room = steps * 4 * BUDGET
    assert packed.efficiency() == (sum(lengths) / room if room else 1.0)
    assert len(packed.cost_imbalance()) == max(steps - 1, 0)
    assert (make(lengths, costs=[0.0] * len(lengths)).cost_imbalance() == 1).all()


@pytest.mark.parametrize(
    "bins, budget, longest, share",
    [
        *((8, 32768, 8192, 0), (1, 32768, 8192, 0), (64, 16384, 4096, 0), (1, 16384, 2048, 0), (512, 4096, 1024, 0)),
        *((3, 8192, 8192, 0.005), (8, 64, 64, 0.01)),
    ],
)
def test_steps_are_as_few_as_hold_the_tokens(bins, budget, longest, share):
    """Near the budget no packer reaches that for sure, and a share more is allowed; half of the lengths are above half
    of the budget in the last set."""
    rng = np.random.default_rng(0)
    lengths = chat_lengths(30_000, longest) if longest > 64 else rng.integers(1, longest + 1, 30_000)
    packed = make(lengths, bins, budget=budget)
    check_laws(packed, lengths)
    assert packed.num_steps <= math.ceil(math.ceil(lengths.sum() / (bins * budget)) * (1 + share))
    assert packed.efficiency() == lengths.sum() / (packed.num_steps * bins * budget)


def spread_over_random(packed, values):
    """Variance over steps of the mean of `values`, over that of as many sequences drawn at random."""
    ends = packed.bin_offsets[:: packed.bins_per_step]
    counts = np.diff(ends)[:-1]
    means = np.add.reduceat(np.asarray(values, float)[packed.indices], ends[:-1])[:-1] / counts
    return means.var() / (np.var(values) * (1 / counts).mean())


@pytest.mark.parametrize("bins, budget", [(1, 32768), (8, 32768), (64, 32768), (8, 8192)])
def test_steps_are_a_fair_sample(bins, budget):
    """Mean length and class share of the steps spread at most twice as much as those of random steps."""
    rng = np.random.default_rng(1)
    lengths = chat_lengths(60_000)
    classes = rng.random(60_000) < np.clip(lengths / 2000, 0.1, 0.9)  # experts write more
    packed = make(lengths, bins, budget=budget, costs=model_costs(lengths, **MODEL_8B))
    assert spread_over_random(packed, lengths) <= 2
    assert spread_over_random(packed, classes) <= 2


@pytest.mark.parametrize("shortest", [1, BUDGET // 2 + 1])
def test_bins_come_in_no_order_of_length(shortest):
    """Lengths up to the budget, which are packed tightly, longest bins first: the plan must not keep that. Lengths
    above half of the budget share no bin."""
    lengths = np.random.default_rng(0).integers(shortest, BUDGET + 1, 4000)
    packed = make(lengths, 1)
    assert packed.num_steps == 4000 or shortest == 1
    longest = np.maximum.reduceat(lengths[packed.indices], packed.bin_offsets[:-1])
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < (0.2 if shortest == 1 else 0.06)


# shares of one token's FLOPs in the blocks' weights: attention of a document of one token, and the head
MODEL_8B = {"attention": 1.88e-5, "head": 0.0753}
MODEL_1B = {"attention": 3.37e-5, "head": 0.27}


def model_costs(lengths, attention, head):
    supervised = np.random.default_rng(2).uniform(0.3, 0.9, len(lengths)) * lengths
    return lengths + attention * lengths.astype(float) ** 2 + head * supervised


@pytest.mark.parametrize("model, mean, worst", [(MODEL_8B, 1.005, 1.02), (MODEL_1B, 1.01, 1.03)], ids=["8B", "1B"])
@pytest.mark.parametrize("bins", [8, 64, 256])
def test_the_bins_of_a_step_cost_the_same(bins, model, mean, worst):
    lengths = chat_lengths(bins * 800 + 20_000)
    packed = make(lengths, bins, budget=32768, costs=model_costs(lengths, **model))
    imbalance = packed.cost_imbalance()
    assert packed.num_steps == math.ceil(lengths.sum() / (bins * 32768))
    assert len(imbalance) >= 1 and (imbalance >= 1).all()
    assert imbalance.mean() <= mean and imbalance.max() <= worst


def test_costs_that_lengths_do_not_explain_are_evened_too():
    lengths = chat_lengths(20_000)
    costs = lengths + 1e-3 * lengths.astype(float) ** 2  # more than three quarters of a long sequence's work
    with_costs, without = make(lengths, 8, budget=32768, costs=costs), make(lengths, 8, budget=32768)
    sums = np.add.reduceat(costs[without.indices], without.bin_offsets[:-1]).reshape(-1, 8)[:-1]
    assert with_costs.num_steps == without.num_steps
    assert with_costs.cost_imbalance().mean() - 1 < 0.8 * ((sums.max(axis=1) / sums.mean(axis=1)).mean() - 1)


def test_lengths_seed_and_epoch_of_any_type_decide_the_order():
    lengths = chat_lengths(5000)
    kinds = [(np.int64, np.float64), (np.int64, np.float64), (np.int32, np.float32), (np.uint16, np.int64)]
    orders = {
        tuple(make(lengths.astype(a), 8, seed, epoch, 32768, costs=lengths.astype(b)).indices)
        for a, b in kinds for seed in (0, 1) for epoch in (0, 1)
    }  # fmt: skip
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        *[([1, BUDGET, wrong, 5], {}, f"sequence 2 has {wrong} tokens") for wrong in (0, -3, BUDGET + 1)],
        ([1.5, 2.0], {}, "whole numbers"),
        ([[1, 2], [3, 4]], {}, "whole numbers"),
        ([1, 2], {"costs": [1.0]}, "shape"),
        ([1, 2], {"costs": [1.0, math.nan]}, "sequence 1"),
        ([1, 2], {"costs": [-1.0, 1.0]}, "sequence 0"),
        ([1, 2], {"budget": 0}, "token_budget"),
        *[([1, 2], {key: value}, key) for key, value in [("bins_per_step", 0), ("seed", -1), ("epoch", -1)]],
        ([1, 2], {"max_sequences": 0}, "max_sequences"),
    ],
)
def test_impossible_input_is_named(lengths, options, message):
    is_setting = options and "costs" not in options
    with pytest.raises(ConfigError if is_setting else DataError, match=message):
        make(lengths, **options)
