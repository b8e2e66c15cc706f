"""Maps: any column becomes messages, a class, a reward or a weight, and several answers become conversations.

pytest tests/text/test_record_map.py
"""

from __future__ import annotations

import math
import pickle
from typing import Any

import msgspec
import pytest

from ochat.errors import ConfigError, DataError
from ochat.text.conversation import Conversation, Message
from ochat.text.record_formats import RecordReader
from ochat.text.records import map as record_map
from ochat.text.records.map import RecordMap
from ochat.text.records.objects import Notes

SAID = (Message("user", "q"), Message("assistant", "a"))
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PATTERNS = {"from": "model", "values": {"gpt-4*": "GPT4", "*turbo*": "fast", "*": "GPT3"}}
BINS = {"from": "score", "bins": [3, 7.5], "names": ["low", "mid", "high"]}
TRUTH = {"from": "label", "values": {"true": "GPT4", "false": "GPT3", "1": "GPT4"}}


def reader(default_condition="", **written) -> RecordReader:
    return RecordReader(map=msgspec.convert(written, RecordMap), default_condition=default_condition)


def read(record, notes=None, default_condition="", **written) -> list[Conversation]:
    return reader(default_condition, **written).read(record, notes or Notes())


@pytest.mark.parametrize(
    ("written", "record", "condition"),
    [
        ({"condition": "model"}, {"model": "gpt-4"}, "gpt-4"),
        ({"condition": "class"}, {"class": 3}, "3"),
        ({"condition": "label"}, {"label": "GPT4"}, "GPT4"),
        ({"condition": PATTERNS}, {"model": "gpt-4-0613"}, "GPT4"),
        ({"condition": PATTERNS}, {"model": "GPT-4"}, "GPT3"),  # letters are told apart
        ({"condition": PATTERNS}, {"model": "gpt-3.5-turbo"}, "fast"),
        ({"condition": PATTERNS}, {"model": ""}, "GPT3"),
        ({"condition": BINS}, {"score": 2}, "low"),
        ({"condition": BINS}, {"score": 3}, "mid"),  # a limit belongs to the upper bin
        ({"condition": BINS}, {"score": 7.4}, "mid"),
        ({"condition": BINS}, {"score": 1e300}, "high"),
        ({"condition": TRUTH}, {"label": False}, "GPT3"),
        ({"condition": TRUTH}, {"label": True}, "GPT4"),
        ({"condition": TRUTH}, {"label": 1}, "GPT4"),
        ({"condition": "condition"}, {"condition": "x"}, "x"),
        ({"condition": {"from": "condition", "values": {"x": "y"}}}, {"condition": "x"}, "y"),
        ({"condition": "rejected"}, {"rejected": "z"}, "z"),  # a key that is refused elsewhere
    ],
)  # fmt: skip
def test_a_class_comes_from_any_column(written, record, condition):
    notes = Notes()
    assert read(CHAT | record, notes, **written) == [Conversation(SAID, condition)]
    assert not notes.ignored, "the column is read"


def test_a_column_may_be_a_class_and_something_else():
    (found,) = read(CHAT | {"reward": 5}, condition=BINS | {"from": "reward"})
    assert (found.condition, found.reward) == ("mid", 5)
    (found,) = read(CHAT | {"score": 8}, condition=BINS, reward="score")
    assert (found.condition, found.reward) == ("high", 8)


def test_a_missing_column_takes_the_default_class():
    assert read(CHAT, condition="model", default_condition="GPT3") == [Conversation(SAID, "GPT3")]
    assert read(CHAT | {"model": None}, condition="model", default_condition="GPT3") == [Conversation(SAID, "GPT3")]
    assert reader(condition="model").read(CHAT, Notes(), "file") == [Conversation(SAID, "file")]


@pytest.mark.parametrize(
    ("written", "record", "said"),
    [
        ({"condition": "model"}, {}, "model: missing; .*--default-condition"),
        ({"condition": "model"}, {"model": ["x"]}, "model: a list is no class"),
        ({"condition": "model"}, {"model": "\ud800"}, "model: a lone surrogate"),
        ({"condition": "model"}, {"model": 10**5000}, "model: too large"),
        ({"condition": "model"}, {"model": math.nan}, "model: expected a finite number"),
        ({"condition": "model"}, {"model": "x", "condition": "y"}, "condition: the map reads the class from 'model'"),
        ({"condition": TRUTH}, {"label": "no"}, r"label: the map has no class for text \('no'\)"),
        ({"condition": BINS}, {"score": "4"}, "score: expected a number, got text"),
        ({"condition": BINS}, {"score": math.nan}, "score: expected a finite number"),
        ({"reward": "score"}, {"score": "x"}, "score: expected a number"),
        ({"reward": "score"}, {"score": 1, "reward": 2}, "reward: score says the same thing, with another value"),
        ({"messages": "dialog"}, {"dialog": CHAT["messages"][:1]}, "dialog: messages says the same|messages: dialog"),
    ],
)  # fmt: skip
def test_faults_name_the_column(written, record, said):
    with pytest.raises(DataError, match=f"^({said})"):
        read(CHAT | record, **written)


@pytest.mark.parametrize(
    ("written", "record"),
    [
        ({"messages": "dialog"}, {"dialog": CHAT["messages"]}),
        ({"messages": "dialog", "role": "who", "content": "said"},
         {"dialog": [{"who": "human", "said": "q"}, {"who": "gpt", "said": "a"}]}),
        ({"roles": {"Pupil": "user", "Teacher": "assistant"}},
         {"messages": [{"role": "Pupil", "content": "q"}, {"from": "Teacher", "value": "a"}]}),
        ({"question": "ask", "answer": "reply"}, {"ask": "q", "reply": "a"}),
        ({"question": "ask", "answer": "reply"}, {"ask": [{"role": "user", "content": "q"}], "reply": "a"}),
        ({"question": "ask", "answer": "reply", "reasoning": "cot"}, {"ask": "q", "reply": "a", "cot": ""}),
        ({"extra": "more", "answer": "reply"}, {"more": "q", "reply": "a"}),
        ({"question": "human", "answer": "bot"}, {"conversation": [{"human": "q", "bot": "a"}]}),
        ({"messages": "turns", "question": "human", "answer": "bot"}, {"turns": [{"human": "q", "bot": "a"}]}),
        ({"messages": "turns"}, {"turns": ["q", "a"]}),
        ({"question": "messages"}, {"messages": CHAT["messages"][:1], "answer": "a"}),
    ],
)  # fmt: skip
def test_columns_stand_for_the_tables_keys(written, record):
    notes = Notes()
    assert read(record, notes, **written) == [Conversation(SAID)] and not notes.ignored


def test_other_columns():
    record = {
        "h": [["q0", "a0"]],
        "q": "q",
        "e": "more",
        "s": "S",
        "r": 2,
        "w": [0, 1, 0, 3],
        "f": 0.5,
        "t": [{"n": 1}],
    }
    record |= {"answer": "a", "images": ["x"]}
    names = {"history": "h", "question": "q", "extra": "e", "system": "s", "reward": "r", "weights": "w", "weight": "f"}
    (found,) = read(record, **names, tools="t", ignore=["images"])
    said = (("user", "q0", 0), ("assistant", "a0", 0.5), ("user", "q\n\nmore", 0), ("assistant", "a", 1.5))
    assert found == Conversation(tuple(Message(*turn) for turn in said), "", "S", 2, ({"n": 1},))


PROMPT = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, {"role": "user", "content": "q"}]
EARLIER = (Message("user", "q0"), Message("assistant", "a0", 0.0), Message("user", "q"))
BY_CLASS: dict[str, Any] = {"answers": {"chosen": "GPT4", "rejected": "GPT3"}}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("record", "before"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, EARLIER[2:]),
        ({"instruction": "q", "history": [], "chosen": answer("a"), "rejected": answer("b")}, EARLIER[2:]),
        ({"prompt": PROMPT, "chosen": [answer("a")], "rejected": [answer("b")]}, EARLIER),
        ({"conversations": PROMPT, "chosen": answer("a"), "rejected": {"from": "gpt", "value": "b"}}, EARLIER),
        ({"chosen": [*PROMPT, answer("a")], "rejected": [*PROMPT, answer("b")]}, EARLIER),
        ({"prompt": "q", "messages": [*PROMPT, answer("a")], "chosen": [*PROMPT, answer("a")],
          "rejected": [*PROMPT, answer("b")]}, EARLIER),
    ],
)  # fmt: skip
def test_answers_of_several_classes_follow_one_prompt_that_is_not_trained(record, before):
    """Whether the prompt stands beside the answers, or in front of each."""
    best, worst = (
        Conversation((*before, Message("assistant", text)), name) for text, name in (("a", "GPT4"), ("b", "GPT3"))
    )
    assert read(record, **BY_CLASS) == [best, worst]
    assert read(record | {"rejected": None}, **BY_CLASS)[0].condition == "GPT4"
    assert len(read(record, answers={"chosen": "GPT4"}, ignore=["rejected"])) == 1
    assert [c.condition for c in read(record | {"condition": "x"}, answers={"chosen": "", "rejected": ""})] == [
        "x",
        "x",
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "q"}, "record: it has no answer"),
        ({"prompt": [], "chosen": "a"}, "chosen: no question stands before this answer"),
        ({"chosen": PROMPT[:1], "rejected": "b"}, "rejected: no question stands before this answer"),
        ({"chosen": "a", "rejected": "b"}, "record: no messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "response": "c"}, "response: .*--ignore response"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: an empty answer"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "rejected: empty"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q"}, "chosen: a transcript"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "rejected: expected text or messages, got 3"),
        ({"prompt": "q", "chosen": "a", "rejected": {"content": "x"}}, "rejected.role: missing"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "condition": "x"}, "condition: .*--ignore condition"),
        ({"prompt": "other", "chosen": [*PROMPT, answer("a")]}, "prompt: the record has chosen as well.*--ignore"),
        ({"messages": PROMPT[:2], "chosen": "a"}, r"messages\[1\]: an answer where chosen should .*\[answers\]"),
    ],
)  # fmt: skip
def test_answers_that_do_not_fit_are_refused(record, said):
    with pytest.raises(DataError, match=f"^{said}"):
        read(record, **BY_CLASS)


def test_a_reply_takes_the_place_of_the_last_answer():
    """As ms-swift writes a rejected response beside the messages."""
    for column in ("messages", "chosen"):
        record = {column: [*PROMPT, answer("a")], "rejected": "b"}
        found = read(record, answers={column: "GPT4", "rejected": "GPT3"})
        assert found == [
            Conversation((*EARLIER, Message("assistant", text)), name) for text, name in (("a", "GPT4"), ("b", "GPT3"))
        ]


def test_calls_in_a_column_of_their_own():
    """As xLAM writes them."""
    (found,) = read({"query": "q", "answers": '[{"name": "f", "arguments": {"x": 1}}]'}, tool_calls="answers")
    assert found.items[1] == Message("assistant", "", tool_calls=({"name": "f", "arguments": {"x": 1}},))


def test_a_file_has_one_class():
    with pytest.raises(DataError, match="condition: 'GPT4', but the input says that the file is 'GPT3'"):
        reader(condition="model").read(CHAT | {"model": "GPT4"}, Notes(), "GPT3")
    with pytest.raises(DataError, match="but the input says that the file is 'x'"):
        reader(**BY_CLASS).read({"prompt": "q", "chosen": "a"}, Notes(), "x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mesages = 'x'", "mesages: unknown key .there is 'messages'"),
        ("condition = {form = 'x'}", "condition.form: unknown key .there is 'from'"),
        ("condition = {from = 'x', bins = [1]}", "1 bins need 2 names"),
        ("condition = {from = 'x', bins = [2, 1], names = ['a', 'b', 'c']}", "bins must rise"),
        ("condition = {from = 'x', bins = [nan], names = ['a', 'b']}", "bins must rise"),
        ("condition = {from = 'x', values = {a = 'b'}, bins = [1], names = ['a', 'b']}", "values or bins"),
        ("condition = {from = 'x', names = ['a']}", "names need bins"),
        ("condition = {values = {a = 'b'}}", "from"),
        ("roles = {Teacher = 'wizard'}", "roles.Teacher: 'wizard' is no role"),
        ("reward = 'x'\nweight = 'x'", "x: the map reads this column as two things"),
        ("messages = 'chosen'\nanswers = {chosen = 'a'}", "chosen: the map reads"),
        ("condition = 'x'\nanswers = {chosen = 'a'}", "both give classes"),
        ("messages = 3", "messages"),
    ],
)  # fmt: skip
def test_a_map_that_cannot_be_is_refused(tmp_path, text, said):
    path = tmp_path / "map.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as error:
        record_map.load(path)
    assert str(path) in str(error.value)


def test_a_map_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--map .*no such file; `ochat prepare --describe FILE`"):
        record_map.load(tmp_path / "map.toml")


def test_the_examples_of_the_module_are_maps(tmp_path):
    path = tmp_path / "map.toml"
    _, first, _, second, _ = (record_map.__doc__ or "").split("\n\n") + [""]
    for text in (first, second):
        path.write_text(text, encoding="utf-8")
        assert record_map.load(path) != RecordMap()


def test_a_reader_pickles():
    one = reader("GPT3", messages="dialog", condition=BINS)
    other = pickle.loads(pickle.dumps(one))
    record = {"dialog": CHAT["messages"], "score": 9}
    assert other == one and other.read(record, Notes()) == one.read(record, Notes())
