"""Rewards as text: pytest tests/text/test_reward_text.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.text.attributes import AttributeFormat
from ochat.text.reward_text import RewardText

finite = st.floats(-1e6, 1e6)


def test_a_reward_at_an_edge_belongs_to_the_bin_above():
    text = RewardText((0.2, 0.5))
    assert [text.of(reward) for reward in (-3, 0.1999, 0.2, 0.49, 0.5, 9)] == [
        f"reward:{n}" for n in (0, 0, 1, 1, 2, 2)
    ]
    assert text.to_dict() == {"field": "reward", "edges": [0.2, 0.5], "names": ["reward:0", "reward:1", "reward:2"]}


@pytest.mark.parametrize(
    ("step", "reward", "expected"),
    [(0.1, 0.73, "0.7"), (0.1, 0.3, "0.3"), (0.25, 0.9, "1"), (1.0, 2.5, "2"), (0.1, -0.01, "0"), (5.0, 1e-9, "0")],
)
def test_rounded_rewards_are_short(step, reward, expected):
    assert RewardText(step=step).of(reward) == f"reward:{expected}"


@given(st.lists(finite, min_size=1, max_size=5, unique=True), st.lists(finite, min_size=1))
def test_the_order_of_conditions_is_that_of_rewards(edges, rewards):
    for text in (
        RewardText(tuple(sorted(edges))),
        RewardText(step=0.5, attributes=AttributeFormat("<{name} {value}>")),
    ):
        names = [text.of(reward) for reward in sorted(rewards)]
        assert text.in_order([*reversed(names), "GPT4", ""]) == list(dict.fromkeys(names))
        assert RewardText.of_manifest(text.to_dict(), text.attributes) == text
