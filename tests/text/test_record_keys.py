"""The table of keys: every key is read, ignored by name or refused by name, at every level (laws/test_record_law.py).

pytest tests/text/test_record_keys.py
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest

from ochat.errors import DataError
from ochat.text.record_formats import RecordReader
from ochat.text.records.keys import CALL, DETAIL, LEVELS, MESSAGE, PART, RECORD
from ochat.text.records.objects import Notes

METADATA = ("uuid", "source", "timestamp", "prompt_id", "answer_type", "score", "\ud800", "", "x" * 10_000)


def read(record, notes=None, **options):
    return RecordReader(empty_answers="keep", **options).read(record, notes or Notes())


def sample() -> dict:
    """A record with an object of every level, and no key that is not needed."""
    call = {"name": "f", "arguments": {}}
    answer = {"role": "assistant", "content": "abc", "tool_calls": [call]}
    answer["train_detail"] = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    return {"messages": [{"role": "user", "content": [{"text": "a"}]}, answer]}


def inside(record: dict, level) -> dict:
    """The object of the sample that belongs to the level."""
    user, answer = record["messages"]
    found = {"record": record, "message": answer, "part": user["content"][0]}
    return (found | {"call": answer["tool_calls"][0], "detail": answer["train_detail"][0]})[level.name]


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_key_stands_once_at_each_level(level):
    assert [name for name, count in Counter(n for key in level.keys for n in key.names).items() if count > 1] == []


REFUSED = [(level, name) for level in LEVELS for key in level.keys if not key.meaning for name in key.names]


@pytest.mark.parametrize(("level", "name"), REFUSED, ids=lambda each: getattr(each, "name", each))
def test_a_key_is_refused_by_name_until_it_is_ignored_by_name(level, name):
    record = sample()
    inside(record, level)[name] = ["x"]
    with pytest.raises(DataError, match=rf"(^|\.){name}: .*--ignore {level.shown(name)}$"):
        read(record)
    for ignored in (name, level.shown(name)):
        notes = Notes()
        assert read(record, notes, ignore=frozenset([ignored])) == read(sample())
        assert notes.ignored == {level.shown(name): 1}
    for empty in (None, "", [], {}):
        inside(record, level)[name] = empty
        assert read(record) == read(sample())


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("name", METADATA)
def test_metadata_is_counted_and_makes_no_difference(level, name):
    record, notes = sample(), Notes()
    inside(record, level)[name] = {"any": [1]}
    assert read(record, notes) == read(sample())
    assert notes.ignored == {level.shown(name): 1} and len(level.shown(name)) < 60
    inside(record, level)[name] = None
    assert read(record, notes) == read(sample()) and sum(notes.ignored.values()) == 1, "null is absent"


@pytest.mark.parametrize(
    ("level", "name", "meant"),
    [
        (RECORD, "message", "messages"), (RECORD, "Condition", "condition"), (RECORD, "rewrad", "reward"),
        (RECORD, "weigth", "weight"), (MESSAGE, "wieght", "weight"), (MESSAGE, "tool_call", "tool_calls"),
        (PART, "texts", "text"), (CALL, "argument", "arguments"), (DETAIL, "begin_ofset", "begin_offset"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_until_it_is_ignored(level, name, meant):
    record = sample()
    inside(record, level)[name] = 1
    with pytest.raises(DataError, match=rf"{name}: .*did you mean '{meant}'.*--ignore {level.shown(name)}"):
        read(record)
    assert read(record, ignore=frozenset([level.shown(name)])) == read(sample())


@pytest.mark.parametrize(
    ("level", "one", "other", "value"),
    [
        (RECORD, "system", "system_prompt", "s"), (RECORD, "tools", "functions", [{"name": "f"}]),
        (RECORD, "weight", "loss_weight", 0.5), (MESSAGE, "weight", "loss_scale", 0.5), (MESSAGE, "train", "loss", 0),
        (MESSAGE, "reasoning_content", "thinking", "hm"), (PART, "weight", "loss_weight", 2),
    ],
)  # fmt: skip
def test_two_keys_of_one_meaning_say_it_once_or_are_refused(level, one, other, value):
    once, twice, unlike = sample(), sample(), sample()
    inside(once, level)[one] = value
    inside(twice, level).update({one: value, other: value})
    assert read(twice) == read(once) != read(sample())
    inside(unlike, level).update({one: value, other: "x"})
    with pytest.raises(
        DataError, match=rf"{other}: {one} says the same thing, .*--ignore {level.shown(one)}; or leave"
    ):
        read(unlike)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("name", ["assistant_mask", "turn_weights", "is_trainable", "loss_on_this"])
def test_a_key_that_looks_like_a_weight_is_refused(level, name):
    for value in (True, 0, 0.5, [0, 1], "false", "0.5", "[0, 1]", ["assistant"]):
        record = sample()
        inside(record, level)[name] = value
        with pytest.raises(DataError, match=f"{name}: it looks like a weight.*--ignore {level.shown(name)}"):
            read(record)
        assert read(record, ignore=frozenset([level.shown(name)])) == read(sample())
    inside(record, level)[name] = "text is metadata"
    assert read(record) == read(sample())


@pytest.mark.parametrize(
    ("level", "name", "about"),
    [
        (RECORD, "deepseek_reasoning", "reasoning"), (RECORD, "Complex_CoT", "reasoning"),
        (MESSAGE, "think", "reasoning"), (MESSAGE, "thinkingContent", "reasoning"),
        (MESSAGE, "reasoning_details", "reasoning"), (PART, "my thoughts", "reasoning"),
        (RECORD, "system_text", "system"), (RECORD, "custom_system_prompt", "system"),
        (RECORD, "developer_message", "system"), (RECORD, "tool_list", "tools"),
        (RECORD, "function_definitions", "tools"), (RECORD, "dialog_history", "history"),
        (RECORD, "history_messages", "history"),
    ],
)  # fmt: skip
def test_a_key_that_looks_like_what_is_said_is_refused(level, name, about):
    for value in ("x", ["x"], [{"x": 1}], [["q", "a"]], {"x": 1}):
        record = sample()
        inside(record, level)[name] = value
        with pytest.raises(
            DataError, match=f"{name}: it looks like {about}, .*; name it .*--ignore {level.shown(name)}$"
        ):
            read(record)
        assert read(record, ignore=frozenset([level.shown(name)])) == read(sample())
    for value in (True, 3, "", " ", [], {}, [True]):
        inside(record, level)[name] = value
        assert read(record) == read(sample())


@pytest.mark.parametrize(
    "name", ["system_fingerprint", "operating_system", "cot_type", "tool_choice", "reasoning_model"]
)
def test_a_key_that_is_about_what_is_said_is_metadata(name):
    assert read(sample() | {name: "x"}) == read(sample())


def test_what_is_nested_or_large_without_end_is_refused():
    deep, large = [], 10**5000  # which Python does not write
    for _ in range(100_000):
        deep = [deep]
    for record in (
        {"messages": deep},
        {"messages": [{"role": "user", "content": deep}]},
        {"prompt": deep, "completion": "a"},
        {"prompt": "a", "completion": "b", "tools": [{"name": deep}]},
        {"prompt": "a", "completion": "b", "history": deep},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": deep}}]}]},
        {"prompt": "a", "completion": "b", "system": deep, "system_prompt": copy.copy(deep)},
        {"prompt": large, "completion": "b"},
        {"prompt": "a", "completion": "b", "label": "x", "weight": large},
        {"messages": [{"role": "user", "content": "a", "spans": [[0, large, large]]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": large}}]}]},
    ):
        with pytest.raises(DataError):
            read(record)
    for _ in range(100):
        deep = {"a": deep} if isinstance(deep, dict) else {}
    tools = {"prompt": "a", "completion": "b", "tools": [deep]}  # which Python reads, and no template should write
    with pytest.raises(DataError, match=r"tools\[0\]: objects and lists are nested more than 64 deep"):
        read(tools)
