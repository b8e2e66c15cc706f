"""The settings that steps were made with are never lost: pytest tests/train/test_config_history.py"""

import pytest
from msgspec.structs import replace

from ochat import config as configuration
from ochat.train import identity

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
