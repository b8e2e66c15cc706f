"""The learning rate: the automatic rule's figures, and the shape of the schedule."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.config import OptimConfig
from ochat.model.config import ModelConfig
from ochat.train.schedule import choose_lr, lr_at

MODEL = ModelConfig("llama", 32002, 32, 48, 2, 4, 2, 8)


@pytest.mark.parametrize(
    ("model_type", "vocab_size", "divisor", "family"),
    [
        ("llama", 32002, 1.0, "for Llama"),
        ("llama", 128256, 5.3, "for Llama 3"),
        ("mistral", 32002, 6.0, "for Mistral"),
        ("qwen2", 151936, 1.0, "for qwen2"),
    ],
)
def test_auto_follows_the_supervised_tokens_of_a_step(model_type, vocab_size, divisor, family):
    # 200k supervised tokens a step is the published setting: 3e-4 * sqrt(0.05) = 6.7e-5 for Llama 2
    value, reason = choose_lr("auto", 200_000, replace(MODEL, model_type=model_type, vocab_size=vocab_size))
    assert value == pytest.approx(6.708e-5 / divisor, rel=1e-3)
    assert reason.endswith(family) and "200,000 supervised tokens" in reason


def test_a_number_is_taken_as_it_is():
    value, reason = choose_lr(2e-5, 7, MODEL)
    assert value == 2e-5 and "set in the configuration" in reason


@given(st.integers(1, 2000), st.floats(0, 0.9), st.floats(0, 1))
def test_the_schedule_rises_to_one_then_falls_to_the_minimum(num_steps, warmup_ratio, least):
    config = OptimConfig(lr=1.0, warmup_ratio=warmup_ratio, min_lr_ratio=least)
    rates = [lr_at(step, num_steps, config) for step in range(num_steps + 1)]  # one more than there are
    warmup = math.ceil(Fraction(repr(warmup_ratio)) * num_steps)
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(0 < rate <= 1 + 1e-12 for rate in rising) and rising == sorted(rising)
    assert all(least - 1e-12 <= rate <= 1 + 1e-12 for rate in falling) and falling == sorted(falling, reverse=True)
    assert rising[-1:] in ([], [1.0])
    assert warmup == num_steps or (falling[0], falling[-1]) == pytest.approx((1.0, least))


@given(st.integers(1, 100), st.integers(1, 100))
def test_a_warm_up_that_is_a_whole_number_of_steps_has_so_many(percent, hundreds):
    """In floats 0.28 * 25 is a little more than 7."""
    config, num_steps = OptimConfig(lr=1.0, warmup_ratio=percent / 100), 100 * hundreds
    warmup = percent * hundreds
    assert lr_at(warmup - 1, num_steps, config) == 1.0 and (warmup == 1 or lr_at(warmup - 2, num_steps, config) < 1)
    assert lr_at(6, 25, OptimConfig(lr=1.0, warmup_ratio=0.28)) == 1.0
