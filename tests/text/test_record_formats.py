"""Importers: a conversation written in every format reads back the same; what cannot be expressed is refused by field.

pytest tests/text/test_record_formats.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.text.conversation import Conversation, Message
from ochat.text.record_formats import convert

turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(), st.none() | st.floats(-2, 2)), min_size=1)


def written_as(format: str, conversation: Conversation) -> dict:
    """The conversation as a record of `format`."""
    if format == "openchat":
        return conversation.to_dict()
    role_key, text_key, key = {
        "messages": ("role", "content", "messages"),
        "sharegpt": ("from", "value", "conversations"),
    }[format]
    names = {"user": "human", "assistant": "gpt", "system": "system"} if format == "sharegpt" else {}
    said = [("system", conversation.system, None)] if conversation.system else []
    said += [(m.role, m.content, m.weight) for m in conversation.items]
    record = {key: [{role_key: names.get(r, r), text_key: t, "weight": w} for r, t, w in said], "id": "7"}
    return record | {"condition": conversation.condition, "reward": conversation.reward}


FORMATS = ("openchat", "messages", "sharegpt")


@given(turns, st.text(), st.text(), st.none() | st.floats(-1, 1), st.sampled_from(FORMATS), st.booleans())
def test_formats_agree(said, condition, system, reward, format, auto):
    conversation = Conversation(tuple(Message(*turn) for turn in said), condition, system, reward)
    record = written_as(format, conversation)
    assert convert(record, "auto" if auto else format) == conversation


def test_alpaca():
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "S", "weight": 0.5, "condition": "GPT3"}
    expected = Conversation((Message("user", "Add.\n\n1, 2"), Message("assistant", "3", 0.5)), "GPT3", "S")
    assert convert(record) == expected
    assert convert({"instruction": "Add.", "input": "", "output": "3"}).items[0].content == "Add."


@pytest.mark.parametrize("format", FORMATS)
def test_the_record_wins_over_the_default_condition(format):
    said = (Message("user", "a"), Message("assistant", "b"))
    assert convert(written_as(format, Conversation(said, "GPT3")), default_condition="GPT4").condition == "GPT3"
    assert convert(written_as(format, Conversation(said)), default_condition="GPT4").condition == "GPT4"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"text": "b "}]
    assert convert({"messages": [{"role": "user", "content": parts}]}).items[0].content == "ab "


def chat(*turns: dict) -> dict:
    return {"messages": list(turns)}


SYSTEM = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat({"role": "tool", "content": "x"}), r"messages\[0\].role: role 'tool'"),
        (chat({"role": "user", "content": "x"}, SYSTEM), r"messages\[1\].role: a system"),
        (chat({"role": "user"}), r"messages\[0\].content: missing"),
        (chat({"role": "user", "content": None}), r"messages\[0\].content: expected text, got null"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}), r"messages\[0\].content\[0\].type: only text"),
        (chat({"role": "assistant", "content": "", "tool_calls": [{}]}), r"messages\[0\].tool_calls"),
        (chat({"role": "user", "content": "", "weight": "1"}), r"messages\[0\].weight: expected a number"),
        (chat(SYSTEM), "messages: only a system message"),
        (chat(SYSTEM) | {"system": "y"}, r"messages\[0\].role: the record has a `system`"),
        ({"messages": []}, "messages: empty"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\].value: expected text"),
        ({"conversations": [{"from": "function_response", "value": ""}]}, r"conversations\[0\].from"),
        ({"instruction": "x"}, "output: missing"),
        ({"instruction": "x", "output": "y", "reward": "z"}, "reward: expected a number"),
        ({"text": "x"}, "none of the keys .* it has 'text'"),
        ({"messages": [], "items": []}, "belong to different formats"),
        ([1], "record: expected an object"),
    ],
)
def test_faults_name_their_field(record, message):
    with pytest.raises(DataError, match=message):
        convert(record)


def test_unknown_format():
    with pytest.raises(ConfigError, match="known: auto, openchat, messages, sharegpt, alpaca"):
        convert({"items": []}, format="chatml")


@pytest.mark.parametrize("wrong", [{"conditon": "GPT4"}, {"rewrad": 1.0}, {"Condition": "GPT4"}])
def test_a_misspelt_key_of_ours_is_refused_in_every_format(wrong):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="did you mean"):
        convert({"messages": turns} | wrong)
    with pytest.raises(DataError, match="did you mean 'weight'"):
        convert({"messages": [turns[0], turns[1] | {"wieght": 3}]})
    assert convert({"messages": turns, "id": 7, "source": "x"}).items[1].content == "b"
