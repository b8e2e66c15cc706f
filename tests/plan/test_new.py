"""`ochat new` writes a config that `ochat check` passes, from what the data and the plan say."""

import json

import pytest

from ochat import config as configuration
from ochat.commands import check, new
from ochat.commands.check import CheckOptions
from ochat.commands.new import NewOptions
from ochat.errors import ConfigError, UsageError
from ochat.plan.gpus import GPUS

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip


def written(world, path, **options):
    options = {"base": str(world.base), "data": str(world.data)} | options
    new.main(NewOptions(output=str(path), **options))
    return configuration.load(path), path.read_text()


@pytest.mark.parametrize("gpus", [0, 2])
def test_the_config_passes_the_check_and_the_next_command_is_that(world, tmp_path, capsys, gpus):
    path = tmp_path / "run.toml"
    config, text = written(world, path, gpus=gpus)
    assert capsys.readouterr().out.strip() == f"next: ochat check {path}" + " --gpus 2" * (gpus == 2)
    check.main(CheckOptions(path, gpus=max(gpus, 1)), [f"--run.dir={tmp_path / 'run'}", "--train.device=cpu"])
    assert {name: each.reward for name, each in config.classes.items()} == {"GPT4": 1.0, "GPT3": 0.1}
    assert config.data.token_budget >= 75 and config.data.bins_per_step % max(gpus, 1) == 0
    assert config.train.device == ("auto" if gpus else "cpu") and "the longest conversation has 75" in text
    assert max(map(len, text.splitlines())) <= 120


def test_it_is_printed_whole_where_no_file_is_named(world, capsys):
    new.main(NewOptions(base=str(world.base), data=str(world.data), gpus=0))
    printed = capsys.readouterr().out
    assert "[classes.GPT4]" in printed and printed.endswith(
        "# next: save this as run.toml, and run: ochat check run.toml\n"
    )


def test_the_expert_is_the_class_that_is_named(world, tmp_path):
    config, _ = written(world, tmp_path / "run.toml", gpus=0, expert="GPT3")
    assert {name: each.reward for name, each in config.classes.items()} == {"GPT4": 0.1, "GPT3": 1.0}
    with pytest.raises(ConfigError, match="--expert names 'GPT9'; the classes of"):
        written(world, tmp_path / "other.toml", gpus=0, expert="GPT9")


@pytest.mark.parametrize(
    ("card", "gpus", "lora", "master"),
    [("H200", 8, 0, "float32"), ("H200", 1, 0, "float32"), ("H100", 1, 0, "bfloat16")],
)
def test_what_does_not_fit_is_made_to_fit_and_said(world, tmp_path, card, gpus, lora, master):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA_8B))
    config, text = written(world, tmp_path / "run.toml", base=str(base), gpus=gpus, card=card)
    assert config.optim.master_dtype == master and (config.lora.rank > 0) == bool(lora)
    assert config.train.recompute in ("none", "elementwise", "block")
    assert f"of {GPUS[card].memory_gib} GiB" in text and "does not fit:" not in text
    assert ("does not fit" in text) == (master == "bfloat16")


@pytest.mark.parametrize(("tokens", "gpus"), [(10**9, 8), (10**6, 8), (10**4, 4), (1, 1)])
def test_a_step_has_bins_for_each_gpu_and_an_epoch_steps(tokens, gpus):
    bins = new.bins_of(tokens, tokens // 2, 8192, gpus)
    assert bins % gpus == 0 and bins > 0
    assert bins == gpus or (tokens / 8192 / bins >= new.STEPS and bins * 8192 / 2 <= new.SUPERVISED)


def test_what_is_missing_is_asked_for_on_a_terminal_alone(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UsageError, match="--base is missing"):
        new.main(NewOptions())
    answers = iter([f"{world.base}\n", f"{world.data}\n", "0\n"])
    monkeypatch.setattr(
        "sys.stdin", type("Terminal", (), {"isatty": lambda _: True, "readline": lambda _: next(answers)})()
    )
    new.main(NewOptions(output=str(tmp_path / "run.toml")))
    assert configuration.load(tmp_path / "run.toml").base.path == str(world.base)
    assert "GPUs, 0 for a CPU [" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="exists; name another --output"):
        written(world, tmp_path / "run.toml")
