"""Conversations of a data set as text, and the count of messages that an export without a boundary changes.

pytest tests/evaluate/test_chats.py
"""

import json

import pytest

from ochat.commands.export import ExportOptions, boundary_note, main
from ochat.errors import DataError
from ochat.evaluate import chats
from ochat.export import serving
from ochat.text import record_formats
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from tests import text_kit, tiny


def _record(*said, system="", condition="GPT4"):
    items = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"items": items, "condition": condition, "system": system}


def test_a_prepared_set_gives_its_conversations_back(tmp_path):
    records = tiny.conversations(9)
    world = tiny.make(tmp_path, records)
    tokenizer, template = tokenizers.load(world.base), templates.load("openchat_v3.2")
    expected = [record_formats.convert(record) for record in records]
    of_files = chats.read_chats(tmp_path / "conversations.jsonl", template, tokenizer, 100)
    of_set = chats.read_chats(world.data, template, tokenizer, 100)
    for found in (of_files, of_set):
        assert [(c.condition, c.system, [m.content for m in c.items]) for c in found] == [
            (c.condition, c.system, [m.content for m in c.items]) for c in expected
        ]
    spread = chats.read_chats(world.data, template, tokenizer, 3)
    assert [each.items for each in spread] == [of_set[index].items for index in (0, 4, 8)]


def test_conversations_that_no_server_takes_are_left_out(tmp_path):
    tokenizer, template = tokenizers.load(tiny.write_tokenizer(tmp_path / "t")), templates.load("openchat_v3.2")
    path = tiny.write_lines(tmp_path / "a.jsonl", [_record("a", "b"), _record("x<|end_of_turn|>", "c")])
    assert [c.items[0].content for c in chats.read_chats(path, template, tokenizer, 9)] == ["a"]
    tiny.write_lines(path, [_record("x<|end_of_turn|>", "c")])
    with pytest.raises(DataError, match="no conversation there can be sent"):
        chats.read_chats(path, template, tokenizer, 9)


def test_messages_that_merge_with_their_prefix_are_counted(tmp_path):
    tokenizer = tokenizers.load(text_kit.small_folder("qwen", tmp_path / "base"), ("<|end_of_turn|>",))
    template, counted = templates.load("openchat_3.5"), []
    said = [record_formats.convert(_record(*each)) for each in ((") x", "b"), ("a", ")"), ("a", "b"))]
    for boundary in (True, False):
        out = tmp_path / str(boundary)
        serving.write(out, template, tokenizer, ("GPT4",))
        serving.adapt(out, condition=None, boundary=boundary)
        counted.append(chats.count_changed(out, template, tokenizer, said))
    assert counted == [(0, 6), (2, 6)]


def test_export_says_how_many_messages_change(tmp_path, capsys):
    """Of the run's own data, if it is there; of --data; or that it could not count."""
    world = tiny.make(tmp_path, model={"model_type": "qwen2"})
    tiny.train(world, tmp_path / "run", "--data.max_steps=1")
    out = tmp_path / "out"
    main(ExportOptions(tmp_path / "run", out))
    printed = capsys.readouterr().out
    assert "without it, 0 of 153 messages (0.0%) get other ids" in printed  # 72 exchanges and 9 system texts
    other = tiny.write_lines(tmp_path / "other.jsonl", [_record("a", "b", system="s")])
    assert "0 of 3 messages" in boundary_note(ExportOptions(tmp_path / "run", out, data=(other,)))
    world.data.rename(tmp_path / "moved")
    assert "--data DATA counts how often" in boundary_note(ExportOptions(tmp_path / "run", out))
    main(ExportOptions(tmp_path / "run", tmp_path / "kept", boundary="always"))
    assert "boundary" not in capsys.readouterr().out
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["model_type"] == "qwen2"
