"""The settings that steps were made with are never lost: pytest tests/train/test_config_history.py"""

import json
import shutil

import pytest
from msgspec.structs import replace

from ochat import cli
from ochat import config as configuration
from ochat.data.dataset import TokenDataset
from ochat.train import identity
from tests import tiny

EARLIER = "config.until_step_40.toml"
DIFFER = f"settings differ from step 41 on; {EARLIER} keeps the earlier ones: optim.lr {{}} (was {{}})"
HISTORIES = {  # starts as (optim.lr, steps that are done of 60) -> what the last one logs, and the lr that a file has
    "first starts": ([(1.0, 0), (2.0, 0)], [], {"config.toml": 2.0}),  # the second has no checkpoint of the first
    "the same": ([(1.0, 0), (1.0, 40)], [], {"config.toml": 1.0}),
    "others": ([(1.0, 0), (2.0, 40)], [DIFFER.format(2.0, 1.0)], {"config.toml": 2.0, EARLIER: 1.0}),
    "others that made no step": (  # what the second trained was cut off by the third
        [(1.0, 0), (2.0, 40), (3.0, 40)], [DIFFER.format(3.0, 2.0)], {"config.toml": 3.0, EARLIER: 1.0},
    ),
    "of a finished run": (
        [(1.0, 0), (2.0, 60)],
        ["config.toml stays as the run was made; not used: optim.lr 2.0 (was 1.0)"],
        {"config.toml": 1.0},
    ),
    "of a run with more steps than they ask for": (
        [(1.0, 0), (2.0, 80)],
        ["config.toml stays as the run was made; not used: optim.lr 2.0 (was 1.0)"],
        {"config.toml": 1.0},
    ),
}  # fmt: skip


def config(lr=1.0, **rewards):
    tree = {"base": {"path": "b"}, "data": {"path": "d"}, "optim": {"lr": lr}}
    return configuration.from_tree(tree | {"classes": {name: {"reward": value} for name, value in rewards.items()}})


def record(folder, settings, step):
    identity.record_config(folder, configuration.dump(settings), step=step, num_steps=60)


@pytest.mark.parametrize("name", HISTORIES)
def test_settings_are_kept_and_logged_where_they_change(tmp_path, caplog, name):
    starts, logged, kept = HISTORIES[name]
    for lr, step in starts:
        caplog.clear()
        record(tmp_path / "runs" / "a", config(lr), step)
    assert caplog.messages == logged
    assert {path.name: configuration.load(path).optim.lr for path in (tmp_path / "runs" / "a").iterdir()} == kept


def test_every_difference_is_named_but_those_of_a_start(tmp_path, caplog):
    record(tmp_path, config(GPT4=1.0, GPT3=0.1), 0)
    other = config(2.0, GPT4=1.0, Human=0.5)
    run = replace(other.run, resume="auto", resume_mismatched=True, dir="elsewhere")
    record(tmp_path, replace(other, run=run), 40)
    assert caplog.messages[0].split("ones: ")[1].split(", ") == [
        "classes.Human.reward 0.5 (was not set)",
        "optim.lr 2.0 (was 1.0)",
        "classes.GPT3.reward not set (was 0.1)",
    ]


@pytest.mark.parametrize("broken", ["", "[optim", "optim = 1\n", "x = " + "9" * 5000])
def test_a_broken_file_stops_nothing(tmp_path, broken):
    (tmp_path / "config.toml").write_text(broken)
    record(tmp_path, config(), 40)
    assert configuration.load(tmp_path / "config.toml") == config()


def test_a_start_says_before_its_first_step_what_its_number_of_steps_changes(world, tmp_path, capsys):
    """Fewer than are done, and more, which changes the schedule."""

    def said(*more):
        capsys.readouterr()
        tiny.train(world, run, *more)
        text, _, _ = " ".join(capsys.readouterr().out.split()).partition("mfu is of")
        return text

    run = tmp_path / "run"
    assert "learning rate changes" not in said("--data.max_steps=4") + said("--data.max_steps=4")
    kept = (run / "config.toml").read_text()
    text = said("--data.max_steps=2")
    assert "4 steps are done, and the settings ask for 2: nothing is trained" in text
    assert "config.toml stays as the run was made; not used: data.max_steps 2 (was 4)" in text
    assert (run / "config.toml").read_text() == kept and (run / "export").is_dir()
    text = said("--data.max_steps=8")
    rates = [line["lr"] for line in tiny.metrics(run)]
    assert f"step 4 was made with {rates[3]:.3g}" in text and f"step 5 of 8 goes on with {rates[4]:.3g}" in text
    assert rates[4] > 1.5 * rates[3]


def test_conversations_beyond_the_bases_context_are_said_by_prepare_and_by_train(world, tmp_path, capsys):
    short, data = shutil.copytree(world.base, tmp_path / "base"), tmp_path / "data"
    settings = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 24}
    (short / "config.json").write_text(json.dumps(settings))
    (short / "SHA256SUMS").unlink()
    arguments = ["--input", str(world.folder / "conversations.jsonl"), "--base", str(short), "--output", str(data)]
    cli.run("prepare", [*arguments, "--template", "openchat_v3.2"])
    lengths = TokenDataset(str(data)).lengths
    over = int((lengths > 24).sum())
    said = " ".join(capsys.readouterr().out.split())
    assert over and f"more tokens than the base was trained on (24, its max_position_embeddings): {over}" in said
    options = [f"--base.path={short}", f"--data.path={data}", "--data.max_steps=1"]
    tiny.train(world, tmp_path / "run", *options, "--classes.GPT4.weight=1", "--classes.GPT3.weight=1")
    said, _, _ = " ".join(capsys.readouterr().out.split()).partition("mfu is of")
    assert f"{over} sequences (" in said and "longer than the base model's context of 24 tokens" in said
