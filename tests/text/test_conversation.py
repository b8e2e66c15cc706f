"""The schema: records survive a round trip, and every fault is refused by the name of its field.

pytest tests/text/test_conversation.py
"""

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.errors import DataError
from ochat.text.conversation import Conversation, Message, WeightedSpan

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(), values, max_size=3)
calls = st.fixed_dictionaries({"name": st.text(), "arguments": objects}, optional={"id": st.text(min_size=1)})


@st.composite
def messages(draw):
    role, content = draw(st.sampled_from(["user", "assistant", "tool"])), draw(st.text())
    places = sorted(draw(st.sets(st.integers(0, len(content)), max_size=4)))
    spans = [WeightedSpan(a, b, draw(st.floats(-2, 2))) for a, b in zip(places, places[1:], strict=False)]
    said = {}
    if role == "assistant":
        said = {"reasoning": draw(st.text()), "tool_calls": tuple(draw(st.lists(calls, max_size=2)))}
    elif role == "tool":
        said = {"name": draw(st.text()), "tool_call_id": draw(st.text())}
    return Message(role, content, draw(numbers), tuple(spans), **said)


conversations = st.builds(
    Conversation,
    st.lists(messages(), min_size=1).map(tuple),
    st.text(),
    st.text(),
    numbers,
    st.lists(objects, max_size=2).map(tuple),
)

MISSING = object()
GOOD = {
    "items": [{"role": "user", "content": "Hi", "weight": 0}, {"role": "assistant", "content": "Yo", "weight": 1.0}],
    "condition": "GPT4",
    "system": "",
    "reward": 0.5,
}


@given(conversations)
def test_round_trip(conversation):
    record = conversation.to_dict()
    assert Conversation.from_dict(record) == conversation
    assert Conversation.from_dict(json.loads(json.dumps(record))) == conversation


def test_defaults():
    said = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
    expected = Conversation((Message("user", ""), Message("assistant", "a")), "", "", None)
    assert Conversation.from_dict({"items": said}) == expected


@pytest.mark.parametrize("path", [("condition",), ("system",), ("reward",), ("items", 1, "weight"), ("items", 0, "id")])
def test_null_is_the_same_as_a_missing_key(path):
    without, null = changed(path, MISSING), changed(path, None)
    assert Conversation.from_dict(null) == Conversation.from_dict(without)


def changed(path, value):
    """GOOD with another value at `path`."""
    record = copy.deepcopy(GOOD)
    place: Any = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if value is MISSING:
        del place[path[-1]]
    return record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("items",), MISSING, "record: no messages"),
        (("items",), [], "items: empty"),
        (("items",), {"role": "user"}, "items: expected a list, got an object"),
        (("items",), "hi", "items: expected JSON, got other text"),
        (("items", 1), "hi", r"items\[1\]: expected an object, got text"),
        (("items", 1), None, r"items\[1\]: expected an object, got null"),
        (("items", 1, "role"), "judge", r"items\[1\].role: unknown role 'judge'; .*--map"),
        (("items", 1, "role"), ["user"], r"items\[1\].role: expected text, got a list"),
        (("items", 1, "role"), "system", r"items\[1\]: a system message after the first"),
        (("items", 0, "role"), None, r"items\[0\].role: missing or null"),
        (("items", 0, "content"), 5, r"items\[0\].content: expected text, got 5"),
        (("items", 0, "content"), "a\ud800", r"items\[0\].content: a lone surrogate"),
        (("items", 1, "weight"), "1", r"items\[1\].weight: expected a number, got text"),
        (("items", 1, "weight"), math.nan, r"items\[1\].weight: expected a finite number"),
        (("items", 1, "weight"), -math.inf, r"items\[1\].weight: expected a finite number"),
        (("items", 1, "weight"), 10**400, r"items\[1\].weight: too large"),
        (("items", 0, "wieght"), 1, r"items\[0\].wieght: unknown key; did you mean 'weight'.*--ignore message.wieght"),
        (("condition",), 3, "condition: expected text, got 3"),
        (("system",), {"x": 1}, "system: expected text, got an object"),
        (("reward",), math.inf, "reward: expected a finite number"),
        (("reward",), False, "reward: expected a number, got false"),
        (("conditon",), "x", "conditon: unknown key; did you mean 'condition'.*--ignore conditon"),
        (("conditions",), [], "conditions: unknown key; did you mean 'condition'"),
        (("Reward",), 1, "Reward: unknown key; did you mean 'reward'"),
        (("itemz",), [], "itemz: unknown key; did you mean 'items'"),
        ((7,), 1, "7: a key must be text"),
        (("items", 1, "role"), MISSING, r"items\[1\].role: missing"),
        (("items", 1, "content"), MISSING, r"items\[1\].content: missing"),
        (("items", 1, "contents"), "x", r"items\[1\].contents: unknown key; did you mean 'content'"),
    ],
)
def test_faults_name_their_field(path, value, message):
    with pytest.raises(DataError, match=f"^{message}"):
        Conversation.from_dict(changed(path, value))


@pytest.mark.parametrize("key", ["id", "source", "edition", "title", "timestamp", "model", "language", "\ud800"])
def test_metadata_is_left_out(key):
    record: Any = copy.deepcopy(GOOD) | {key: {"x": 1}}
    record["items"][0][key] = 3
    assert Conversation.from_dict(record) == Conversation.from_dict(GOOD)


@pytest.mark.parametrize("record", [{}, [3], [], None, "x", 3, {"items": None}])
def test_no_conversation_at_all(record):
    with pytest.raises(DataError, match="^record: (no messages|expected an object)"):
        Conversation.from_dict(record)
