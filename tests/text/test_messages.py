"""Messages as people write them: roles, parts, weights, reasoning and calls, each by whatever key it has.

pytest tests/text/test_messages.py
"""

from __future__ import annotations

from typing import Any

import pytest

from ochat.errors import DataError
from ochat.text.conversation import Message, WeightedSpan
from ochat.text.records.messages import CALLS, ROLES, MessageReader
from ochat.text.records.objects import Notes

CALL = {"name": "rain", "arguments": {"city": "Delft"}}


def read(message, notes=None, **options) -> Message:
    (turn,) = MessageReader(**options).turns([message], "messages", "user", notes or Notes())
    return turn.message


def says(role: Any = "assistant", content: Any = "abcdef", **more):
    return {"role": role, "content": content} | more


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_roles(name, role):
    for written in (name, name.upper(), f" {name.capitalize()}\n"):
        assert read({"from": written, "value": "x"}) == Message(role, "x")
    assert read({"from": "Narrator", "value": "x"}, roles={"Narrator": name}) == Message(role, "x")


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        ({}, None), ({"weight": 0}, 0), ({"weight": -2}, -2), ({"loss_weight": 0.5}, 0.5), ({"loss_scale": 3}, 3),
        ({"train": False}, 0), ({"training": True}, 1), ({"trainable": 0}, 0), ({"loss": False}, 0), ({"loss": 1.0}, 1),
        ({"loss_mask": 0}, 0), ({"loss_mask": 1}, 1), ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": 0.5, "loss_mask": 0}, 0), ({"weight": None, "train": None}, None), ({"label": "good"}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["assistant", "user", "tool"])
def test_weights_by_every_name(more, weight, role):
    assert read(says(role, **more)) == Message(role, "abcdef", weight)


def text(said, **more):
    return {"type": "text", "text": said} | more


@pytest.mark.parametrize(
    ("content", "joined", "spans", "reasoning"),
    [
        ([], "", [], ""),
        ([text("a"), text("b ")], "a\nb ", [], ""),
        (["a", {"text": "b"}, {"type": "input_text", "value": "c"}, {"content": ""}], "a\nb\nc\n", [], ""),
        ([text("ab", weight=0), text("c", weight=2)], "ab\nc", [(0, 3, 0), (3, 4, 2)], ""),
        ([text("ab"), text("c", train=False)], "ab\nc", [(3, 4, 0)], ""),
        ([text("ab", loss=False), text("c")], "ab\nc", [(0, 3, 0)], ""),
        ([text("", weight=0)], "", [], ""),
        ([text("", weight=0), text("")], "\n", [(0, 1, 0)], ""),
        ([text("\U0001f600", weight=0), text("c")], "\U0001f600\nc", [(0, 2, 0)], ""),
        ([{"type": "thinking", "thinking": "hm"}, text("a")], "a", [], "hm"),
        ([{"type": "reasoning", "text": "hm"}, {"type": "thinking", "reasoning": "so"}], "", [], "hm\nso"),
    ],
)  # fmt: skip
def test_parts_are_joined_by_newlines_and_weigh_what_they_say(content, joined, spans, reasoning):
    expected = Message("assistant", joined, 0.5, tuple(WeightedSpan(*span) for span in spans), reasoning)
    assert read(says(content=content, weight=0.5)) == expected


@pytest.mark.parametrize(
    ("more", "spans"),
    [
        ({"spans": [[4, 6, 0], [0, 2, True]]}, [(0, 2, 1), (4, 6, 0)]),
        ({"spans": "[[0, 6, 0.5]]"}, [(0, 6, 0.5)]),
        ({"spans": [[0.0, 6.0, 0.5]]}, [(0, 6, 0.5)]),  # a list of Parquet has one type
        ({"spans": []}, []),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]}, [(0, 2, 0)]),
        ({"training_detail": [{"begin_offset": 2, "end_offset": 2, "train": True}], "spans": [[3, 4, 0]]},
         [(2, 3, 1), (3, 4, 0)]),
    ],
)  # fmt: skip
def test_spans_are_characters_of_the_content(more, spans):
    assert read(says(**more)).spans == tuple(WeightedSpan(*span) for span in spans)


def test_a_message_whose_parts_all_weigh_0_is_not_trained():
    """Its end of turn would be, alone."""
    for whole in ({"content": [text("ab", weight=0), text("c", train=False)]}, {"spans": [[0, 2, 0], [2, 6, 0]]}):
        assert read(says(**whole, weight=0.5)).weight_around == 0
    for part in ({"spans": [[0, 5, 0]]}, {"spans": [[0, 6, 0]], "tool_calls": [CALL]}, {"spans": [[0, 6, 0.1]]}):
        assert read(says(**part, weight=0.5)).weight_around == 0.5


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning(key):
    assert read(says(content="a", **{key: "hm"})) == Message("assistant", "a", reasoning="hm")
    assert read({"role": "assistant", key: "hm"}) == Message("assistant", "", reasoning="hm")
    assert read(says("user", "a", **{key: " "})) == Message("user", "a"), "uniform rows have it"


@pytest.mark.parametrize(
    "written",
    [
        {"tool_calls": [CALL]}, {"tool_calls": [{"type": "function", "function": CALL}]}, {"function_call": CALL},
        {"tool_calls": '[{"name": "rain", "arguments": {"city": "Delft"}}]'},
        {"tool_calls": [{"function": {"name": "rain", "arguments": '{"city": "Delft"}'}}]},
        {"tool_calls": [{"name": "rain", "parameters": {"city": "Delft", "day": None}}]},
        {"role": "function_call", "content": '{"name": "rain", "arguments": {"city": "Delft"}}'},
    ],
)  # fmt: skip
def test_calls(written):
    assert read({"role": "assistant", "content": None} | written) == Message("assistant", "", tool_calls=(CALL,))


def test_what_is_beside_a_call():
    several = [{"id": "c1", "function": {"name": "f", "arguments": ""}}, {"name": "g", "arguments": None}]
    calls = ({"name": "f", "arguments": {}, "id": "c1"}, {"name": "g", "arguments": {}})
    assert read(says(content="Wait.", tool_calls=several)) == Message("assistant", "Wait.", tool_calls=calls)
    assert read(says(content="a", tool_calls=[], function_call=None)) == Message("assistant", "a")
    notes = Notes()
    assert read(says("tool", "4", name="f", tool_call_id="c1")) == Message("tool", "4", name="f", tool_call_id="c1")
    assert read(says("user", "4", name="Ada", tool_call_id="c1", label="x"), notes) == Message("user", "4")
    assert notes.ignored == {"message.name": 1, "message.tool_call_id": 1, "message.label": 1}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, r"role: missing or null; --map .*; there is 'content'"),
        ({"input": "x", "output": "y"}, r"role: missing or null; --map .*; there is 'input', 'output'"),
        (says("judge"), "role: unknown role 'judge'; known: user.*--map: roles = {\"judge\" = \"user\"}"),
        (says(3), "role: expected text, got 3"),
        ({"from": ["user"], "value": "x"}, "from: expected text, got a list"),
        (says(content=None), "content: missing or null"),
        ({"from": "gpt", "value": 3}, "value: expected text, got 3"),
        (says(value="other"), "value: content says the same thing, with another value.*--ignore message.content; or"),
        (says(content={"a": 1}), "content: expected text, got an object"),
        (says(content=[3]), r"content\[0\]: expected an object, got 3"),
        (says(content=[{"type": "image_url"}]), r"content\[0\].type: parts of type 'image_url' are not read"),
        (says(content=[text("a"), text(None)]), r"content\[1\].text: missing or null"),
        (says(content=[text("a", thinking="b")]), r"content\[0\].thinking: it is not read in a part of type text"),
        (says(content=[{"type": "thinking", "thinking": "b", "weight": 0}]), r"content\[0\].weight: it is not read"),
        (says(content=[{"image_url": {"url": "x"}}]), r"content\[0\].image_url: images.*--ignore part.image_url"),
        (says(content=[text("a", loss=2.3)]), r"content\[0\].loss: expected true, false, 1 or 0, got 2.3"),
        (says(weight="1"), "weight: expected a number"),
        (says(loss=2.31), r"loss: expected true, false, 1 or 0, got 2.31"),
        (says(train="no"), "train: expected true, false, 1 or 0"),
        (says(mask=0), "mask: trainers disagree.*--ignore message.mask"),
        (says(label=False), "label: false says whether the answer is good.*--ignore message.label"),
        (says(images=["x.jpg"]), "images: .*--ignore message.images"),
        (says(spans=[[0, 9, 1]]), r"spans\[0\]: .* is no part of 6 characters of content"),
        (says(spans=[[0.5, 2, 1]]), r"spans\[0\]: 0.5 is no whole number"),
        (says(spans=[[2, 2, 1]]), r"spans\[0\]: .* is no part"),
        (says(spans=[["0", 1, 1]]), r"spans\[0\]: text \('0'\) is no whole number"),
        (says(spans=[[0, 1]]), r"spans\[0\]: \[start, end, weight\] is needed, got 2 values"),
        (says(spans=[[0, 1, "x"]]), r"spans\[0\]: expected a number"),
        (says(spans=[[0, 3, 1], [2, 4, 0]]), "spans: two weights for character 2"),
        (says(content=[text("ab", weight=0)], spans=[[1, 2, 1]]), "spans: two weights for character 1"),
        (says(train_detail=[{"begin_offset": 0, "train": True}]), r"train_detail\[0\]: null is no whole number"),
        (says(train_detail=[{"begin_offset": 0, "end_offset": 1}]), r"train_detail\[0\].train: missing"),
        (says(reasoning="high"), r"reasoning: text \('high'\) says how much to reason.*--ignore message.reasoning"),
        (says("user", reasoning="hm"), "reasoning: only the assistant.*--ignore message.reasoning"),
        (says("user", content=[{"type": "thinking", "thinking": "hm"}]), "content: only the assistant"),
        (says("user", tool_calls=[CALL]), "tool_calls: only the assistant calls"),
        (says("tool", function_call=CALL), "function_call: only the assistant calls"),
        (says(tool_calls=[3]), r"tool_calls\[0\]: expected an object"),
        (says(tool_calls=3), "tool_calls: expected an object"),
        (says(tool_calls=[{"arguments": {}}]), r"tool_calls\[0\].name: missing"),
        (says(tool_calls=[{"name": "f", "arguments": "x"}]), r"tool_calls\[0\].arguments: expected JSON"),
        (says(tool_calls=[{"name": "f", "arguments": [1]}]), r"tool_calls\[0\].arguments: expected an object"),
        (says(tool_calls=[{"name": "f", "arguments": {"a": "\ud800"}}]), r"tool_calls\[0\].arguments: a lone"),
        (says(tool_calls=[{"type": "custom", "name": "f"}]), r"tool_calls\[0\].type: .*custom"),
        (says(tool_calls=[{"function": CALL, "name": "f"}]), r"tool_calls\[0\].function: .* stand both"),
        (says("function_call", "X"), "content: expected JSON, got other text"),
        (says("function_call", '{"name": "f", "name": "g"}'), "content: name: the key comes twice"),
        (says("function_call", '{"name": "f"}', spans=[[0, 1, 0]]), r"spans\[0\]: .* 0 characters"),
    ],
)  # fmt: skip
def test_faults_name_their_field(message, said):
    with pytest.raises(DataError, match=rf"^messages\[0\]\.{said}"):
        read(message)


def test_columns_stand_for_role_and_content():
    columns = {"speaker": "role", "said": "content"}
    assert read({"speaker": "gpt", "said": "a"}, columns=columns) == Message("assistant", "a")
    assert read({"speaker": "gpt", "said": "a", "value": "a"}, columns=columns) == Message("assistant", "a")
    with pytest.raises(DataError, match=r"messages\[0\].content: said says the same thing"):
        read({"speaker": "gpt", "said": "a", "content": "b"}, columns=columns)
    for missing, message in (("said", {"speaker": "gpt"}), ("speaker", {"said": "a"})):
        with pytest.raises(DataError, match=rf"messages\[0\].{missing}: missing or null.*; there is '"):
            read(message, columns=columns)


def test_names_of_calls_are_no_roles():
    assert not set(CALLS) & set(ROLES)
