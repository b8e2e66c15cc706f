"""Conditions of several attributes: pytest tests/text/test_attributes.py"""

import pytest

from ochat.errors import ConfigError, DataError
from ochat.text import template
from ochat.text.attributes import AttributeFormat
from ochat.text.conversation import Conversation
from ochat.text.record_formats import RecordReader
from ochat.text.records.objects import Notes

ITEMS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_attributes_stand_in_the_order_of_their_names():
    for given in ({"verbosity": 1, "quality": 3}, {"quality": 3.0, "verbosity": True + 0, "humor": None}):
        read = Conversation.from_dict({"items": ITEMS, "condition": given})
        assert read.condition == "quality:3,verbosity:1"
    assert AttributeFormat("<{name}={value}>", "").text({"b": 0.5, "a": "x y"}, "condition") == "<a=x y><b=0.5>"


def test_a_turn_has_attributes_of_its_own():
    items = [ITEMS[0], ITEMS[1] | {"condition": {"quality": 0}}]
    read = Conversation.from_dict({"items": items, "condition": {"quality": 4}})
    assert read.condition == "quality:4" and [m.condition for m in read.items] == [None, "quality:0"]
    assert Conversation.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"quality": []}, r"condition\.quality: expected text or a number, got a list"),
        ({"quality": "a,b"}, r"condition\.quality: 'a,b' is blank or holds ','"),
        ({"quality": " "}, r"condition\.quality: ' ' is blank"),
        ({"": 1}, r"condition\.: '' is blank"),
        (3, "condition: expected text, got 3"),
    ],
)
def test_faults_name_their_field(condition, message):
    with pytest.raises(DataError, match=message):
        Conversation.from_dict({"items": ITEMS, "condition": condition})
    with pytest.raises(DataError, match=r"items\[1\]\." + message):
        Conversation.from_dict({"items": [ITEMS[0], ITEMS[1] | {"condition": condition}]})


def test_no_prefix_of_a_system_text_carries_a_class():
    items = [{"role": "system", "content": "Be brief.", "condition": "GPT4"}, *ITEMS]
    with pytest.raises(DataError, match=r"items\[0\]\.condition: no prefix of the role system carries a class"):
        Conversation.from_dict({"items": items})


def test_a_template_says_how_they_are_written(tmp_path):
    path = tmp_path / "mine.toml"
    text = 'context = 10\nprefix = "{role}: "\neot = "<|im_end|>"\n[roles]\nuser = "Q"\nassistant = "A"\n'
    path.write_text('attribute = "{name} is {value}"\nattribute_separator = "; "\n' + text)
    form = template.load(path)
    assert template.Template.from_dict(form.to_dict()) == form
    reader = RecordReader(attributes=form.attributes)
    (read,) = reader.read({"items": ITEMS, "condition": {"quality": 3, "tone": "dry"}}, Notes())
    assert read.condition == "quality is 3; tone is dry"
    path.write_text('attribute = "{name}"\n' + text)
    with pytest.raises(ConfigError, match=r"attribute must hold \{value\} exactly once"):
        template.load(path)


def test_a_rendered_template_writes_one_class():
    form = template.load("chatml")
    items = [ITEMS[0] | {"condition": "GPT4"}, ITEMS[1]]
    same = Conversation.from_dict({"items": items, "condition": "GPT4"})
    assert form.prepared(same) == same
    with pytest.raises(DataError, match=r"items\[0\]\.condition: 'GPT4', and the template chatml writes one class"):
        form.prepared(Conversation.from_dict({"items": items, "condition": "GPT3"}))
