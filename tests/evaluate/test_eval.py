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
from ochat.commands.generate import GenerateOptions, answer
from ochat.data.prepare import prepare
from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.export.hf_folder import export
from ochat.text.conversation import Conversation
from tests import tiny
from tests.evaluate.conftest import answer_alone, read_lines
from tests.tiny_text import write_lines


def run(model, data, **more):
    return evaluate(EvalOptions(model, (data,), dtype="float32", **more))


def test_a_run_its_checkpoint_and_its_export_are_one_model(world, chats, exported):
    folder = world.folder / "alone"
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    models = (folder, newest, exported)
    tables = [run(model, data)["classes"] for model in models for data in (world.data, chats)]
    assert all(table == tables[0] for table in tables)
    assert run(folder / "checkpoints" / "step_5", chats)["classes"] != tables[0]
    assert set(tables[0]) == {"GPT3", "GPT4"}
    for row in tables[0].values():
        assert list(row["prefixes"]) == ["GPT3", "GPT4"] and row["tokens"] > row["conversations"] > 1
        for cell in row["prefixes"].values():
            assert cell["nll_interval"][0] < cell["nll"] < cell["nll_interval"][1]
            assert cell["accuracy_interval"][0] <= cell["accuracy"] <= cell["accuracy_interval"][1]
    asked = {"condition": "GPT3", "max_new_tokens": 8, "dtype": "float32"}
    said = [answer(GenerateOptions(model, ("1+1", "20+3"), **asked)) for model in models]
    assert said[0] == said[1] == said[2] and len(said[0]) == 2 and any(said[0])


def test_a_damaged_checkpoint_is_refused(world, chats, alone, tmp_path):
    folder = shutil.copytree(world.folder / "alone" / "checkpoints" / "step_5", tmp_path / "step_5")
    weights = next(folder.glob("weights-*"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="weights-"):
        run(folder, chats)


def test_adapters_are_measured_in_their_base(world, chats):
    folder = world.folder / "adapted"
    tiny.train(world, folder, "--data.max_steps=2", "--lora.rank=2", "--train.dtype=float32")
    export(folder, world.folder / "merged", dtype="float32")
    assert run(folder, chats)["classes"] == run(world.folder / "merged", chats)["classes"]
    with pytest.raises(ConfigError, match="nowhere.*--base"):
        run(folder, chats, base=str(world.folder / "nowhere"))


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
    best = min(row["prefixes"], key=lambda name: row["prefixes"][name]["nll"])
    assert shown.count(f"{best} * ") == 1 == shown.count("GPT3 * ") + shown.count("GPT4 * "), shown
    assert str(output) in shown


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


def test_a_template_without_classes_has_one_column(world, chats, tmp_path):
    prepare([chats], world.base, "openchat_v3.2", tmp_path / "data", conditions="ignore", progress=False)
    record = run(world.base, tmp_path / "data")
    assert record["conditions"] == [""] and list(record["classes"]["GPT4"]["prefixes"]) == [""]
    assert record["classes"]["GPT4"]["prefixes"][""]["nll_above_own"] is None
    with pytest.raises(ConfigError, match="--conditions"):
        run(world.base, tmp_path / "data", conditions=("GPT4",))


def test_data_that_does_not_belong_to_the_model_is_refused(world, chats, exported, other_base, tmp_path):
    prepare([chats], world.base, "openchat_v3.2", tmp_path / "data", conditions="assistant", progress=False)
    for model, data, more, needle in (
        (exported, tmp_path / "data", {}, "another template"),
        (exported, world.data, {"template": "openchat_v3.2"}, "--template openchat_v3.2"),
        (world.base, chats, {}, "--template"),
        (other_base, world.data, {}, "another tokenizer"),
    ):
        with pytest.raises(ConfigError, match=needle):
            run(model, data, **more)


BAD_RECORDS = [({"items": []}, ":2: items"), ("{bad", ":2: "), ({"nothing": 1}, ":2: record")]


@pytest.mark.parametrize(
    ("more", "second", "error", "needle"),
    [
        ({"only_class": "GPT5"}, None, ConfigError, "--only-class GPT5: .*GPT3.*|--only-class GPT5: .*GPT4"),
        ({"limit": 0}, None, ConfigError, "--limit 0"),
        ({"device": "cuda:9"}, None, ConfigError, "--device cuda:9"),
        ({"template": "openchat_v9"}, None, ConfigError, "openchat_v9"),
        ({"conditions": ("a<|end_of_turn|>",)}, None, ConfigError, "special token"),
        ({"prompts": "x.jsonl"}, None, ConfigError, "--prompts.*--answers"),
        ({"max_new_tokens": 0}, None, ConfigError, "--max-new-tokens 0"),
        ({"output": "/nowhere/x.json"}, None, ConfigError, "/nowhere/x.json"),
        *(({}, second, DataError, needle) for second, needle in BAD_RECORDS),
        *(({"answers": "a"}, second, DataError, needle) for second, needle in BAD_RECORDS),
        ({"answers": "a"}, {"prompt": "x" * 600}, ConfigError, ":2: .*512"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(
    chats, exported, tmp_path, monkeypatch, more, second, error, needle
):
    """`second`: the second record of the data, or of the prompts where there are answers."""
    monkeypatch.setattr("ochat.export.open_model.open_model", lambda *_, **__: pytest.fail("too late"))
    more, data, bad = dict(more), chats, tmp_path / "bad.jsonl"
    if second is not None:
        text = second if isinstance(second, str) else json.dumps(second)
        bad.write_text(f"{chats.read_text().splitlines()[0]}\n{text}\n")
    if "answers" in more:
        more |= {"prompts": bad, "answers": tmp_path / "answers.jsonl"}
    elif second is not None:
        data = bad
    more |= {key: Path(more[key]) for key in ("output", "prompts") if key in more}
    with pytest.raises(error, match=needle):
        run(exported, data, **more)
