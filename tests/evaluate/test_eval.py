"""`ochat eval` end to end: one model is one table however it is stored, what cannot be is named, prompts are answered:
pytest tests/evaluate/test_eval.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ochat import cli
from ochat.commands.eval import EvalOptions, evaluate
from ochat.commands.generate import GenerateOptions, answer
from ochat.data.prepare import prepare
from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.export.hf_folder import export
from ochat.infer.generate import generate
from ochat.model import hf
from ochat.text.conversation import Conversation, Message
from ochat.text.template import load as load_template
from ochat.text.tokenizer import load as load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def chats(world):
    return world.folder / "conversations.jsonl"


def run(model, data, **more):
    return evaluate(EvalOptions(model, (data,), dtype="float32", **more))


@pytest.fixture(scope="module")
def trained(world, alone):
    """A run, and its newest checkpoint exported without rounding."""
    export(world.folder / "alone", world.folder / "exported", dtype="float32")
    return world.folder / "alone", world.folder / "exported"


def test_a_run_its_checkpoint_and_its_export_are_one_model(world, chats, trained):
    folder, exported = trained
    newest = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))[-1]
    tables = [run(model, data)["classes"] for model in (folder, newest, exported) for data in (world.data, chats)]
    assert all(table == tables[0] for table in tables)
    assert run(folder / "checkpoints" / "step_5", chats)["classes"] != tables[0]
    assert set(tables[0]) == {"GPT3", "GPT4"}
    for row in tables[0].values():
        assert list(row["prefixes"]) == ["GPT3", "GPT4"] and row["tokens"] > row["conversations"] > 1
        for cell in row["prefixes"].values():
            assert cell["nll_interval"][0] < cell["nll"] < cell["nll_interval"][1]
            assert cell["accuracy_interval"][0] <= cell["accuracy"] <= cell["accuracy_interval"][1]


def test_a_run_its_checkpoint_and_its_export_answer_alike(trained):
    folder, exported = trained
    newest = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))[-1]
    answers = [
        answer(GenerateOptions(model, ("1+1", "20+3"), condition="GPT3", max_new_tokens=8, dtype="float32"))
        for model in (folder, newest, exported)
    ]
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 2 and any(answers[0])


def test_a_damaged_checkpoint_is_refused(chats, trained, tmp_path):
    folder = shutil.copytree(trained[0] / "checkpoints" / "step_5", tmp_path / "step_5")
    weights = next(folder.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights-.*damaged"):
        run(folder, chats)


def test_adapters_are_measured_in_their_base(world, chats):
    folder = world.folder / "adapted"
    tiny.train(world, folder, "--data.max_steps=2", "--lora.rank=2", "--train.dtype=float32")
    export(folder, world.folder / "merged", dtype="float32")
    assert run(folder, chats)["classes"] == run(world.folder / "merged", chats)["classes"]
    with pytest.raises(ConfigError, match="nowhere.*--base"):
        run(folder, chats, base=str(world.folder / "nowhere"))


def test_the_command_shows_a_table_and_writes_its_numbers(chats, trained, tmp_path, capsys):
    output = tmp_path / "swap.json"
    line = [str(trained[1]), str(chats), "--only-class", "GPT4", "--limit", "7", "--output", str(output)]
    cli.run("eval", [*line, "--conditions", "GPT3", "GPT4", "--dtype", "float32"])
    shown, record = capsys.readouterr().out, json.loads(output.read_text())
    ((name, row),) = record["classes"].items()
    assert (name, row["conversations"], record["conditions"]) == ("GPT4", 7, ["GPT3", "GPT4"])
    for cell in row["prefixes"].values():
        low, high = cell["nll_interval"]
        assert f"{cell['nll']:.3f}" in shown and f"[{low:.3f}, {high:.3f}]" in shown
    best = min(row["prefixes"], key=lambda name: row["prefixes"][name]["nll"])
    assert shown.count(f"{best} * ") == 1 == shown.count("GPT3 * ") + shown.count("GPT4 * "), shown
    assert "[low, high]: 95%" in " ".join(shown.split()) and f"wrote {output}" in shown


def test_prompts_are_answered_under_each_class(chats, trained, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    asked: list[dict[str, Any]] = [{"prompt": f"{i}+1", "system": "Add."} for i in range(20)]  # more than a batch
    asked += [json.loads(line) for line in chats.read_text().splitlines()[:6]]  # the answers there are left out
    prompts.write_text("".join(json.dumps(each) + "\n" for each in asked))
    run(trained[1], chats, limit=1, conditions=("GPT4", ""), prompts=prompts, answers=answers, max_new_tokens=5)
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [each["condition"] for each in found] == ["GPT4", ""] * 26
    model, tokenizer = hf.load(trained[1], dtype="float32"), load_tokenizer(trained[1])
    template = load_template("openchat_v3.2")
    for line, each in enumerate(found):
        record = asked[line // 2]
        conversation = Conversation.from_dict(each)
        items = record.get("items") or [{"content": record["prompt"]}, {}]
        question = [item["content"] for item in items[:-1]]
        assert [item.content for item in conversation.items[:-1]] == question
        assert each["source"] == f"{prompts}:{line // 2 + 1}" and conversation.system == record["system"]
        # by hand, alone: the conversation as training writes it up to the answer
        opened = Conversation(
            (*conversation.items[:-1], Message("assistant", "")), each["condition"], conversation.system
        )
        ids = template.encode(opened, tokenizer)[0][:-1]  # without the end of turn
        (new,) = generate(model, [ids], max_new_tokens=5, stop_ids=[tokenizer.special_tokens[tiny.EOT]])
        assert conversation.items[-1].content == tokenizer.decode(new) and each["is_cut"] == (len(new) == 5)


def test_a_template_without_classes_has_one_column(world, chats, tmp_path):
    prepare([chats], world.base, "openchat_v3.2", tmp_path / "data", conditions="ignore", progress=False)
    record = run(world.base, tmp_path / "data")
    assert record["conditions"] == [""] and list(record["classes"]["GPT4"]["prefixes"]) == [""]
    assert record["classes"]["GPT4"]["prefixes"][""]["nll_above_own"] is None
    with pytest.raises(ConfigError, match="openchat_v3.2 has none in its prefixes"):
        run(world.base, tmp_path / "data", conditions=("GPT4",))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"only_class": "GPT5"}, "--only-class GPT5: .* it has GPT3, GPT4|GPT4, GPT3"),
        ({"limit": 0}, "--limit 0"),
        ({"device": "cuda:9"}, "--device cuda:9"),
        ({"template": "openchat_v9"}, "template 'openchat_v9': no such name"),
        ({"conditions": ("a<|end_of_turn|>",)}, "spells a special token"),
        ({"prompts": "x.jsonl"}, "--prompts FILE and --answers FILE go together"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"output": "/nowhere/x.json"}, "/nowhere/x.json: cannot be written"),
    ],
)
def test_what_cannot_be_is_named_before_the_model_is_loaded(chats, trained, monkeypatch, more, named):
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    paths = {key: Path(value) if key in ("output", "prompts") else value for key, value in more.items()}
    with pytest.raises(ConfigError, match=named):
        run(trained[1], chats, **paths)


def test_data_that_does_not_belong_to_the_model_is_refused(world, chats, trained, tmp_path):
    prepare([chats], world.base, "openchat_v3.2", tmp_path / "data", conditions="assistant", progress=False)
    with pytest.raises(ConfigError, match="another template or --conditions than the model speaks"):
        run(trained[1], tmp_path / "data")
    with pytest.raises(ConfigError, match="is prepared, and has its own"):
        run(trained[1], world.data, template="openchat_v3.2")
    with pytest.raises(ConfigError, match="give --template"):
        run(world.base, chats)
    tiny.write_base(tmp_path, tmp_path / "other", {"vocab_size": 261})
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": "<more>", "id": 259})
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer than the model's"):
        run(tmp_path / "other", world.data)


@pytest.mark.parametrize(
    ("line", "named"),
    [('{"items": []}', ":2: items: empty"), ("{bad", ":2: "), ('{"nothing": 1}', ":2: record: none of the keys")],
)
@pytest.mark.parametrize("which", ["data", "prompts"])
def test_a_bad_record_is_named_by_its_line(chats, trained, tmp_path, line, named, which):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(chats.read_text().splitlines()[0] + "\n" + line + "\n")
    more = {"prompts": bad, "answers": tmp_path / "answers.jsonl"} if which == "prompts" else {}
    with pytest.raises(DataError, match=named):
        run(trained[1], bad if which == "data" else chats, **more)
    with pytest.raises(ConfigError, match="but the model's context is 512"):
        (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600}))
        run(trained[1], chats, prompts=tmp_path / "long.jsonl", answers=tmp_path / "answers.jsonl")
