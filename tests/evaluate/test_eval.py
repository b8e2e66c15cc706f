"""`ochat eval`: one model gives one table however it is stored, bad input is named, prompts are answered:
pytest tests/evaluate/test_eval.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ochat import cli
from ochat.commands.eval import EvalOptions, evaluate
from ochat.commands.generate import GenerateOptions
from ochat.data.prepare import prepare
from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.export.hf_folder import export
from ochat.text.conversation import Conversation
from tests import tiny
from tests.evaluate.conftest import answer_alone, read_lines
from tests.tiny import write_lines


def run(model, data, **more):
    return evaluate(EvalOptions(model, (data,), dtype="float32", **more))


def test_a_run_its_checkpoint_and_its_export_are_one_model(world, chats, exported):
    folder = world.folder / "alone"
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    models = (folder, newest, exported)
    tables = [run(model, data)["classes"] for model in models for data in (world.data, chats)]
    assert all(table == tables[0] for table in tables) and set(tables[0]) == {"GPT3", "GPT4"}
    assert run(folder / "checkpoints" / "step_5", chats)["classes"] != tables[0]
    for row in tables[0].values():
        assert list(row["prefixes"]) == ["GPT3", "GPT4"] and row["tokens"] > row["conversations"] > 1
        for cell in row["prefixes"].values():
            for key in ("nll", "accuracy"):
                assert cell[f"{key}_interval"][0] < cell[key] < cell[f"{key}_interval"][1]
    asked = {"condition": "GPT3", "max_new_tokens": 8, "dtype": "float32"}
    said = [tiny.generated(GenerateOptions(model, ("1+1", "20+3"), **asked)) for model in models]
    assert said[0] == said[1] == said[2] and len(said[0]) == 2 and any(said[0])


def test_a_damaged_checkpoint_is_refused_and_adapters_are_measured_in_their_base(world, chats, alone, tmp_path):
    folder = shutil.copytree(world.folder / "alone" / "checkpoints" / "step_5", tmp_path / "step_5")
    weights = next(folder.glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="weights-"):
        run(folder, chats)
    tiny.train(world, tmp_path / "lora", "--data.max_steps=2", "--lora.rank=2", "--train.dtype=float32")
    export(tmp_path / "lora", tmp_path / "merged", dtype="float32")
    assert run(tmp_path / "lora", chats)["classes"] == run(tmp_path / "merged", chats)["classes"]
    with pytest.raises(ConfigError, match="nowhere.*--base"):
        run(tmp_path / "lora", chats, base=str(tmp_path / "nowhere"))


def test_the_command_shows_a_table_and_writes_its_numbers(chats, exported, tmp_path, capsys):
    output = tmp_path / "swap.json"
    line = [str(exported), str(chats), "--only-class", "GPT4", "--limit", "7", "--output", str(output)]
    cli.run("eval", [*line, "--conditions", "GPT3", "GPT4", "--dtype", "float32"])
    shown, record = capsys.readouterr().out, json.loads(output.read_text())
    ((name, row),) = record["classes"].items()
    assert (name, row["conversations"], record["conditions"]) == ("GPT4", 7, ["GPT3", "GPT4"])
    for cell in row["prefixes"].values():
        low, high = cell["nll_interval"]
        assert f"{cell['nll']:.3f}" in shown and f"[{low:.3f}, {high:.3f}]" in shown
    best, other = sorted(row["prefixes"], key=lambda name: row["prefixes"][name]["nll"])
    assert (shown.count(f"{best} * "), shown.count(f"{other} * ")) == (1, 0) and str(output) in shown


def test_prompts_are_answered_under_each_class(chats, exported, tmp_path):
    asked: list[dict[str, Any]] = [{"prompt": f"{i}+1", "system": "Add."} for i in range(20)]  # more than a batch
    asked += read_lines(chats)[:6]  # the answers there are left out
    prompts, answers = write_lines(tmp_path / "prompts.jsonl", asked), tmp_path / "answers.jsonl"
    run(exported, chats, limit=1, conditions=("GPT4", ""), prompts=prompts, answers=answers, max_new_tokens=5)
    found = read_lines(answers)
    assert [each["condition"] for each in found] == ["GPT4", ""] * 26
    for line, each in enumerate(found):
        record, conversation = asked[line // 2], Conversation.from_dict(each)
        *question, said = conversation.items
        items = record.get("items") or [{"content": record["prompt"]}, {}]
        assert [item.content for item in question] == [item["content"] for item in items[:-1]]
        assert each["source"] == f"{prompts}:{line // 2 + 1}" and conversation.system == record["system"]
        alone = Conversation(tuple(question), each["condition"], conversation.system)
        assert (said.content, each["is_cut"]) == answer_alone(exported, alone, 5)


def test_a_template_without_classes_has_one_column_and_data_of_another_model_is_refused(
    world, chats, exported, other_base, tmp_path
):
    plain, other = tmp_path / "plain", tmp_path / "other"
    for data, mode in ((plain, "ignore"), (other, "assistant")):
        prepare([chats], world.base, "openchat_v3.2", data, conditions=mode, progress=False)
    record = run(world.base, plain)
    assert record["conditions"] == [""] and list(record["classes"]["GPT4"]["prefixes"]) == [""]
    assert record["classes"]["GPT4"]["prefixes"][""]["nll_above_own"] is None
    for model, data, more, needle in (
        (world.base, plain, {"conditions": ("GPT4",)}, "--conditions"),
        (exported, other, {}, "another template"),
        (exported, world.data, {"template": "openchat_v3.2"}, "--template openchat_v3.2"),
        (world.base, chats, {}, "--template"),
        (other_base, world.data, {}, "another tokenizer"),
    ):
        with pytest.raises(ConfigError, match=needle):
            run(model, data, **more)


BAD_OPTIONS = [
    ({"only_class": "GPT5"}, "--only-class GPT5: .*GPT3.*|--only-class GPT5: .*GPT4"),
    ({"limit": 0}, "--limit 0"),
    ({"device": "cuda:9"}, "--device cuda:9"),
    ({"template": "openchat_v9"}, "openchat_v9"),
    ({"conditions": ("a<|end_of_turn|>",)}, "special token"),
    ({"prompts": Path("x.jsonl")}, "--prompts.*--answers"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ({"output": Path("/nowhere/x.json")}, "/nowhere/x.json"),
]
BAD_RECORDS = [('{"items": []}', ":2: items"), ("{bad", ":2: "), ('{"nothing": 1}', ":2: record")]


@pytest.mark.parametrize(
    ("more", "second", "error", "needle"),
    [
        *((more, "", ConfigError, needle) for more, needle in BAD_OPTIONS),
        *(({"data": True}, second, DataError, needle) for second, needle in BAD_RECORDS),
        *(({"answers": True}, second, DataError, needle) for second, needle in BAD_RECORDS),
        ({"answers": True}, json.dumps({"prompt": "x" * 600}), ConfigError, ":2: .*512"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(
    chats, exported, tmp_path, monkeypatch, more, second, error, needle
):
    """`second`: the second record of the data, or of the prompts where there are answers."""
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(f"{chats.read_text().splitlines()[0]}\n{second}\n")
    given = {"data": chats} | more
    if "data" in more:
        given["data"] = bad
    if "answers" in more:
        given |= {"prompts": bad, "answers": tmp_path / "answers.jsonl"}
    with pytest.raises(error, match=needle):
        run(exported, **given)
