"""Laws of `ochat prepare --describe`: what it prints is a map that reads the records, and it stays short."""

import json
import re
import tomllib

import pytest

from ochat.data.describe import RECORDS, SHOWN, describe
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text.record_formats import RecordReader
from ochat.text.records import map as record_map
from ochat.text.records.objects import Notes
from tests.tiny import write_lines

SAID = [("Pupil", "How many?"), ("Teacher", "Two.")]
TURNS = [{"speaker": who, "said": said} for who, said in SAID]
COLUMNS = {key: [turn[key] for turn in TURNS] for key in ("speaker", "said")}
TOOLS = [{"name": "f", "description": "a " * 99}]
KINDS = {  # two records -> conversations of each, and their classes
    "alpaca": ([{"instruction": "a", "output": f"b{n}", "id": n} for n in range(2)], 1, {""}),
    "other names": ([{"ask": "why?", "reply": f"because {n}", "x": n} for n in range(2)], 1, {""}),
    "a question alone": ([{"prompt": "why?", "story": f"because {n}"} for n in range(2)], 1, {""}),
    "classes": ([{"prompt": "a", "completion": "b", "model": name} for name in "xy"], 1, {"x", "y"}),
    "DPO": ([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2, 2, {"GPT4", "GPT3"}),
    "KTO": ([{"prompt": "a", "completion": "b", "label": good} for good in (True, False)], 1, {"GPT4", "GPT3"}),
    "score": ([{"prompt": "a", "completion": "b", "score": score} for score in (1, 5)], 1, {"low", "high"}),
    "objects of lists": ([{"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}] * 2, 1, {""}),
    "speakers": ([{"dialog": TURNS}] * 2, 1, {""}),
    "speakers, objects of lists": ([{"dialog": COLUMNS}] * 2, 1, {""}),
    "tools": ([{"messages": [{"role": "assistant", "content": "b"}], "tools": json.dumps(TOOLS)}] * 2, 1, {""}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_printed_is_a_map_that_reads_the_records(tmp_path, kind):
    records, count, classes = KINDS[kind]
    path, file = write_lines(tmp_path / "in.jsonl", records), tmp_path / "map.toml"
    file.write_text(describe(path))
    reader = RecordReader(map=record_map.load(file))
    found = [reader.read(record.value(), Notes()) for record in RecordFile(path)]
    assert [len(each) for each in found] == [count] * 2
    assert {conversation.condition for each in found for conversation in each} == classes
    assert all(conversation.items[-1].role == "assistant" for each in found for conversation in each)
    assert "description" not in file.read_text()


PART = {"type": "text", "text": "Wait.", "mood": "calm"}
CALLED = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "strict": True}}


def test_keys_below_the_messages_are_listed_and_others_are_not(tmp_path):
    """Of content parts and calls; a list beside the messages holds none."""
    turns = [{"role": "Pupil", "words": [PART]}, {"role": "assistant", "words": "b", "tool_calls": [CALLED]}]
    record = {"messages": turns, "tools": TOOLS, "sources": [{"page": 3}], "input": {"messages": []}}
    text = describe(write_lines(tmp_path / "in.jsonl", [record] * 2))
    assert all(key not in text for key in ("description", "page"))
    for name, said in (("mood", r"ignored, text \('calm'\)"), ("strict", "ignored, true"), ("name", "read as name")):
        assert re.search(rf"\n#   {name} +2  {said}\n", text)
    assert tomllib.loads(text)["roles"] == {"Pupil": "user"}


@pytest.mark.parametrize(
    ("roles", "guess"),
    [
        (["user", "assistant"], None), (["Human", "GPT"], None), (["Pupil", "Teacher"], ["user", "assistant"]),
        (["user", "Teacher"], [None, "assistant"]), (["system", "A", "B", "C"], [None, "user", "assistant", "user"]),
        (["function_call", "A"], [None, "user"]), (["A", "assistant"], ["user", None]),
    ],
)  # fmt: skip
def test_roles_that_are_not_known_are_guessed_in_the_order_of_speech(tmp_path, roles, guess):
    turns = [{"role": role, "content": "x"} for role in roles]
    found = tomllib.loads(describe(write_lines(tmp_path / "in.jsonl", [{"messages": turns}])))
    assert found.get("roles") == (guess and {name: role for name, role in zip(roles, guess, strict=True) if role})


def test_what_no_map_helps_with_is_said(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    code = {"instruction": "JSON?", "output": json.dumps([{"people": 1}, {"people": 2}])}
    for record in ({"messages": turns}, code):
        assert describe(write_lines(tmp_path / "in.jsonl", [record])).endswith("\n\n# No map is needed.\n")
    text = describe(write_lines(tmp_path / "in.jsonl", [{"messages": turns, "images": ["a.png"]}]))
    assert "# No map helps with what is refused" in text


def test_many_keys_and_long_ones_stay_short(tmp_path):
    keys = [f"{n}{'k' * 1000}" for n in range(3 * SHOWN)]
    records = [{"instruction": "a", "output": "b"} | {key: n} for n, key in enumerate(keys)]
    text = describe(write_lines(tmp_path / "in.jsonl", records))
    lines = text.splitlines()
    assert len(lines) < SHOWN + 10 and max(map(len, lines)) < 200 and f"and {2 * SHOWN + 2} more" in text
    assert "read as question" in text and "read as answer" in text


def test_bad_records_are_passed_over_until_none_is_left(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{oops\n{"instruction": "a", "output": "b"}\n')
    assert "its first 1 records" in describe(path)
    path.write_text("{oops\n")
    with pytest.raises(DataError, match=f"none of the first {RECORDS} records can be read; `ochat prepare` says why"):
        describe(path)
