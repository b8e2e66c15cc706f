"""What a span trains with, by its own weight, role, class and reward: pytest tests/data/test_weights.py"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.config import ClassConfig, WeightsConfig
from ochat.data.weights import ASSISTANT, ROLES, WeightRule
from ochat.errors import ConfigError

NAMES = ("GPT4", "GPT3")
TABLE = {"GPT4": ClassConfig(reward=1.0), "GPT3": ClassConfig(reward=0.1)}
OWN = st.sampled_from([math.nan, 0.0, 1.0, 0.3, -0.25])
SPANS = st.lists(
    st.tuples(OWN, st.integers(0, len(ROLES) - 1), st.integers(0, 1), st.floats(-1, 2, width=32), st.integers(1, 50)),
    max_size=20,
)


def apply(rule, spans):
    own, roles, class_ids, rewards, tokens = zip(*spans, strict=True) if spans else ([],) * 5
    return rule(
        np.array(own, np.float32), np.array(roles, np.uint8), np.array(class_ids, np.uint16),
        np.array(rewards, np.float32), np.array(tokens, np.int64),
    ).tolist()  # fmt: skip


def by_hand(span, source):
    own, role, class_id, reward, _ = span
    own = (1.0 if role == ASSISTANT else 0.0) if math.isnan(own) else own
    if source == "record" or own == 0:
        return own
    if source == "none":
        return 1.0
    value = (1.0, 0.1)[class_id] if source == "classes" else math.exp((reward - 1) / WeightsConfig().beta)
    return math.copysign(value, own)


@pytest.mark.parametrize("mean", ["", "per_message_mean", "per_conversation_mean"])
@pytest.mark.parametrize("source", ["record", "classes", "reward", "none"])
@given(spans=SPANS)
def test_weights_equal_the_rules_by_hand(source, mean, spans):
    """A mean shares a weight among tokens."""
    rule = WeightRule(WeightsConfig(source=source, **{mean: True} if mean else {}), TABLE, NAMES)
    wanted = [by_hand(span, source) / (span[-1] if mean else 1) for span in spans]
    assert apply(rule, spans) == pytest.approx(wanted, rel=1e-6)


def test_auto_is_the_table_if_there_is_one():
    assert WeightRule(WeightsConfig(), {}, NAMES).source == "record"
    assert WeightRule(WeightsConfig(), TABLE, NAMES).source == "classes"


def test_a_class_may_have_a_weight_or_a_beta_of_its_own():
    table = {"GPT4": ClassConfig(weight=2.0), "GPT3": ClassConfig(reward=0.5, beta=0.25)}
    answers = [(own, ASSISTANT, place, math.nan, 5) for place, own in enumerate((math.nan, 0.7))]
    assert apply(WeightRule(WeightsConfig(), table, NAMES), answers) == pytest.approx([2.0, math.exp(-2)])


def test_a_class_without_entry_is_named_unless_none_of_it_is_used():
    table = {"GPT4": ClassConfig(weight=1.0)}
    with pytest.raises(ConfigError, match="class 'GPT3'.*'GPT4'"):
        WeightRule(WeightsConfig(), table, NAMES)
    WeightRule(WeightsConfig(), table, NAMES, present=["GPT4"])
    with pytest.raises(ConfigError, match="no \\[classes.NAME\\]"):
        WeightRule(WeightsConfig(source="classes"), {}, NAMES)


@pytest.mark.parametrize("entry", [ClassConfig(weight=math.nan), ClassConfig(reward=1e9)])
def test_a_class_without_a_finite_weight_is_refused(entry):
    with pytest.raises(ConfigError, match=r"\[classes.GPT4\] .*finite"):
        WeightRule(WeightsConfig(), {"GPT4": entry}, ["GPT4"])
