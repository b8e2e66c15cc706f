"""The schema: records survive a round trip, and every fault is refused by the name of its field.

pytest tests/text/test_conversation.py
"""

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.errors import DataError
from ochat.text.conversation import Conversation, Message

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
messages = st.builds(Message, st.sampled_from(["user", "assistant"]), st.text(), numbers)
conversations = st.builds(Conversation, st.lists(messages, min_size=1).map(tuple), st.text(), st.text(), numbers)

MISSING = object()
GOOD = {
    "items": [{"role": "user", "content": "Hi", "weight": 0}, {"role": "assistant", "content": "Yo", "weight": 1.0}],
    "condition": "GPT4",
    "system": "",
    "reward": 0.5,
}


@given(conversations)
def test_round_trip(conversation):
    assert Conversation.from_dict(conversation.to_dict()) == conversation


def test_defaults():
    said = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
    expected = Conversation((Message("user", ""), Message("assistant", "a")), "", "", None)
    assert Conversation.from_dict({"items": said}) == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(((), whole, "record: expected an object") for whole in (None, [], "x", 3)),
        (("items",), MISSING, "items: missing"),
        (("items",), [], "items: empty"),
        (("items",), {"role": "user"}, "items: expected a list, got an object"),
        (("items", 1), "hi", r"items\[1\]: expected an object, got text"),
        (("items", 1, "role"), "tool", r"items\[1\].role: unknown role 'tool'"),
        (("items", 0, "role"), "system", r"items\[0\].role: .*`system` field"),
        (("items", 0, "role"), None, r"items\[0\].role: expected text, got null"),
        (("items", 0, "content"), 5, r"items\[0\].content: expected text, got a number"),
        (("items", 0, "content"), "a\ud800", r"items\[0\].content: a lone surrogate"),
        (("items", 1, "weight"), "1", r"items\[1\].weight: expected a number, got text"),
        (("items", 1, "weight"), True, r"items\[1\].weight: expected a number, got a boolean"),
        (("items", 1, "weight"), math.nan, r"items\[1\].weight: expected a finite number"),
        (("items", 1, "weight"), -math.inf, r"items\[1\].weight: expected a finite number"),
        (("items", 1, "weight"), 10**400, r"items\[1\].weight: too large"),
        (("items", 0, "wieght"), 1, r"items\[0\]: unknown key 'wieght'; did you mean 'weight'"),
        (("condition",), None, "condition: expected text, got null"),
        (("system",), ["x"], "system: expected text, got a list"),
        (("reward",), math.inf, "reward: expected a finite number"),
        (("reward",), False, "reward: expected a number, got a boolean"),
        (("conditon",), "x", "record: unknown key 'conditon'; did you mean 'condition'"),
        (("conditions",), [], "record: unknown key 'conditions'; did you mean 'condition'"),
        (("Reward",), 1, "record: unknown key 'Reward'; did you mean 'reward'"),
        (("itemz",), [], "record: unknown key 'itemz'; did you mean 'items'"),
        (("items", 1, "role"), MISSING, r"items\[1\].role: missing"),
        (("items", 1, "content"), MISSING, r"items\[1\].content: missing"),
        (("items", 1, "contents"), "x", r"items\[1\]: unknown key 'contents'; did you mean 'content'"),
    ],
)
def test_faults_name_their_field(path, value, message):
    place = whole = {"whole": copy.deepcopy(GOOD)}
    *above, last = ("whole", *path)
    for key in above:
        place = place[key]
    place[last] = value
    if value is MISSING:
        del place[last]
    with pytest.raises(DataError, match=message):
        Conversation.from_dict(whole["whole"])


@pytest.mark.parametrize("key", ["id", "source", "edition", "title", "timestamp", "model", "language", "\ud800"])
def test_metadata_is_left_out(key):
    record = copy.deepcopy(GOOD) | {key: {"x": 1}}
    record["items"][0][key] = 3
    assert Conversation.from_dict(record) == Conversation.from_dict(GOOD)
