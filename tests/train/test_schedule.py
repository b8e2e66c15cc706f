"""The learning rate: the automatic rule's figures, and the shape of the schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.train.schedule import choose_lr, factor


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
    choice = choose_lr("auto", supervised_tokens_per_step=200_000, model_type=model_type, vocab_size=vocab_size)
    assert choice.value == pytest.approx(6.708e-5 / divisor, rel=1e-3)
    assert choice.reason.endswith(family) and "200,000 supervised tokens" in choice.reason


def test_a_number_is_taken_as_it_is():
    choice = choose_lr(2e-5, supervised_tokens_per_step=7, model_type="mistral", vocab_size=1)
    assert choice.value == 2e-5 and "set in the configuration" in choice.reason


@given(st.integers(1, 2000), st.floats(0, 0.9), st.floats(0, 1))
def test_the_schedule_rises_to_one_then_falls_to_the_minimum(num_steps, warmup_ratio, min_lr_ratio):
    factors = [factor(s, num_steps, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio) for s in range(num_steps)]
    warmup = math.ceil(warmup_ratio * num_steps)
    rising, falling = factors[:warmup], factors[warmup:]
    assert all(0 < f <= 1 + 1e-12 for f in rising) and rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(min_lr_ratio - 1e-12 <= f <= 1 + 1e-12 for f in falling)
    if rising:
        assert rising[-1] == 1.0
    if falling:
        assert falling[0] == pytest.approx(1.0)
        assert factor(num_steps, num_steps, warmup_ratio=warmup_ratio, min_lr_ratio=min_lr_ratio) == pytest.approx(
            min_lr_ratio
        )
