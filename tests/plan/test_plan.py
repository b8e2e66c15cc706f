"""`ochat plan` as a user meets it: pytest tests/plan/test_plan.py"""

import dataclasses
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest

from ochat import cli
from ochat.commands import plan
from ochat.config import BaseConfig, Config, TrainConfig
from ochat.data import manifest as manifests
from ochat.data.prepare import prepare
from ochat.errors import CheckpointError, ConfigError, DataError, UsageError
from ochat.model.config import ModelConfig
from tests.tiny import MODEL, write_lines


def say(capsys, *arguments: object) -> str:
    """What the command prints, without its line breaks."""
    cli.call("plan", [str(argument) for argument in arguments])
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def bare(world, tmp_path):
    """A base of which only the config.json is there."""
    (tmp_path / "bare").mkdir()
    shutil.copy(world.base / "config.json", tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def lengths(tmp_path):
    """A file of 5,000 lengths, 100 of them longer than the tiny configuration's bins of 96 tokens."""
    drawn = np.random.default_rng(0).integers(5, 60, 5000).astype(np.int32)
    drawn[:100] = 120
    np.save(tmp_path / "lengths.npy", drawn)
    return tmp_path / "lengths.npy"


def test_a_data_set_is_planned_on_every_card_or_on_those_asked_for(world, capsys):
    said = say(capsys, world.config, "--train.dtype=bfloat16")
    for fact in ("60 conversations", "supervised", "fill", "lr 0.003", "A100-80", "H100", "H200", "planned memory"):
        assert fact in said
    assert "data.bins_per_step = 4 cannot be shared by 8 GPUs: predicted with 8" in said
    assert "Predicted, not measured" in said
    said = say(capsys, world.config, "--train.dtype=bfloat16", "--card=H100", "--gpus", "4,16", "--nodes=2,3")
    assert all(f"{ranks} H100" in said for ranks in (8, 32, 12, 48)) and "H200" not in said
    said = say(capsys, world.config)
    assert "float32" in said and "tokens/s" not in said, "float32 is not predicted with the rates of bfloat16"


def test_classes_of_equal_weight_get_a_warning(world, capsys, tmp_path):
    """Records without weights and a configuration without [classes] would train without reward, and look right."""
    records = [json.loads(line) for line in (world.folder / "conversations.jsonl").read_text().splitlines()]
    for item in (item for record in records for item in record["items"]):
        del item["weight"]
    plain = write_lines(tmp_path / "plain.jsonl", records)
    prepare([plain], world.base, "openchat_v3.2", tmp_path / "data", progress=False)
    there = [world.config, f"--data.path={tmp_path / 'data'}"]
    warning = "no reward tells them apart: give each one, [classes.NAME] reward"
    assert warning in say(capsys, *there)
    for quiet in ([world.config], [*there, "--weights.source=none"], [*there, "--data.only_class=GPT4"],
                  [*there, "--classes.GPT4.reward=1", "--classes.GPT3.reward=0.1"]):  # fmt: skip
        assert warning not in say(capsys, *quiet)


def test_the_tables_fit_a_terminal(world, lengths, capsys):
    options = ["--train.dtype=bfloat16", "--lengths", str(lengths), "--nodes=512", "--optim.lr=auto"]
    cli.call("plan", [str(world.config), *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80 or "…" in line] == []


def test_lengths_alone_are_enough(world, bare, lengths, capsys):
    options = ["--lengths", lengths, "--supervised=0.25", "--data.epochs=3"]
    said = say(capsys, world.config, f"--base.path={bare}", *options)
    assert "5,000 sequences" in said and "25% of the tokens: assumed" in said
    assert "100 sequences (2.00%) are longer than data.token_budget = 96: planned as cut there" in said
    assert "in 3 epochs" in said and "no weights: enough for a plan" in said
    (bare / "config.json").write_text(json.dumps(MODEL | {"max_position_embeddings": 64}))
    said = say(capsys, world.config, f"--base.path={bare}", "--lengths", lengths)
    assert "100 sequences (2.00%) are longer than the base model's context of 64 tokens" in said


def test_lengths_are_planned_as_a_data_set_of_such_lengths_is(world, tmp_path, capsys):
    from ochat.data.dataset import TokenDataset

    data = TokenDataset(world.data)
    np.save(tmp_path / "same.npy", data.lengths.astype(np.int64))
    share = data.supervised.sum() / data.lengths.sum()
    from_data = say(capsys, world.config)
    from_lengths = say(capsys, world.config, "--lengths", tmp_path / "same.npy", f"--supervised={share}")
    for begin, end in (("tokens a sequence", "plan of"), ("steps", " supervised on average"), ("fill", ";")):
        part = [said[said.index(begin) : said.index(end, said.index(begin))] for said in (from_data, from_lengths)]
        assert part[0] == part[1]


def test_what_prepare_cut_is_repeated(world, capsys, tmp_path):
    data = tmp_path / "cut"
    shutil.copytree(world.data, data)
    manifest = manifests.read_manifest(data)
    manifest["counts"]["truncated"] = 7
    manifests.write_manifest(data / manifests.MANIFEST, manifest)
    assert "7 conversations were longer than the context" in say(capsys, world.config, f"--data.path={data}")
    mix = [f'--data.mix.{name}.path="{path}"' for name, path in (("whole", world.data), ("cut", data))]
    assert f"7 conversations of {data} were longer" in say(capsys, world.config, "--data.path=", *mix)


def test_broken_weights_are_no_base_to_look_at(world, bare, capsys):
    (bare / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        say(capsys, world.config, f"--base.path={bare}")


def test_attention_that_lacks_what_the_model_needs_is_refused(bare):
    gemma = dataclasses.replace(ModelConfig.load(bare), head_dim=64, attention_softcap=50.0)
    for attention in ("auto", "flex", "flash", "fa3", "varlen"):  # no package or GPU is needed to plan for one
        config = Config(base=BaseConfig(str(bare)), train=TrainConfig(attention=attention))
        with pytest.raises(ConfigError, match="no softcap") if attention == "varlen" else nullcontext():
            assert plan.check(config, None, gemma)


@pytest.mark.parametrize(
    ("wrong", "error", "needle"),
    [
        ("--card=B200", UsageError, "--card B200: expected one of A100-80"),
        ("--gpus=0", UsageError, "--gpus 0: expected whole numbers"),
        ("--nodes=x", UsageError, "--nodes x: expected whole numbers"),
        ("--supervised=2", UsageError, "--supervised 2.0: expected a share"),
        ("--data.token_budget=32", DataError, "longer than data.token_budget = 32"),
    ],
)
def test_wrong_input_is_refused(world, wrong, error, needle):
    with pytest.raises(error, match=needle):
        cli.call("plan", [str(world.config), wrong])
