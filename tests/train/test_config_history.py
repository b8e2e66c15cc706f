"""The settings that steps were made with are never lost: pytest tests/run/test_config_history.py"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ochat import config as configuration
from ochat.config import Config
from ochat.train import identity


def config(lr: float = 1e-3, **classes: float) -> Config:
    tree = {"base": {"path": "b"}, "data": {"path": "d"}, "optim": {"lr": lr}}
    return configuration.from_tree(tree | {"classes": {name: {"reward": value} for name, value in classes.items()}})


@pytest.fixture
def keep(caplog):
    """Records settings and returns what is logged."""

    def record(folder, settings: Config, step: int, num_steps: int = 60) -> list[str]:
        caplog.clear()
        identity.record_config(folder, configuration.dump(settings), step=step, num_steps=num_steps)
        return caplog.messages

    return record


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_first_start_says_nothing(keep, tmp_path):
    for lr in (1e-3, 2e-3):  # the second start has no checkpoint of the first
        assert keep(tmp_path / "runs" / "a", config(lr), 0) == [] and names(tmp_path / "runs" / "a") == ["config.toml"]
    assert configuration.load(tmp_path / "runs" / "a" / "config.toml") == config(2e-3)


def test_a_finished_run_keeps_the_settings_that_it_was_made_with(keep, tmp_path):
    keep(tmp_path, config(), 0)
    (said,) = keep(tmp_path, config(2e-3), 60)
    assert "optim.lr 0.002 (was 0.001)" in said and names(tmp_path) == ["config.toml"]
    assert configuration.load(tmp_path / "config.toml") == config()


def test_the_same_settings_are_not_logged(keep, tmp_path):
    keep(tmp_path, config(), 0)
    again = config()
    again = replace(again, run=replace(again.run, resume="auto", resume_mismatched=True, dir="elsewhere"))
    assert keep(tmp_path, again, 40) == [] and names(tmp_path) == ["config.toml"]


def test_other_settings_are_logged_and_the_earlier_are_kept(keep, tmp_path):
    keep(tmp_path, config(GPT4=1.0, GPT3=0.1), 0)
    earlier = (tmp_path / "config.toml").read_text()
    (said,) = keep(tmp_path, config(2e-3, GPT4=1.0, Human=0.5), 40)
    assert said.startswith("settings differ from step 41 on; config.until_step_40.toml keeps the earlier ones: ")
    logged = said.split("ones: ")[1].split(", ")
    assert logged == [
        "classes.Human.reward 0.5 (was not set)",
        "optim.lr 0.002 (was 0.001)",
        "classes.GPT3.reward not set (was 0.1)",
    ]
    assert (tmp_path / "config.until_step_40.toml").read_text() == earlier
    assert configuration.load(tmp_path / "config.toml") == config(2e-3, GPT4=1.0, Human=0.5)


def test_settings_that_made_no_step_do_not_replace_those_that_did(keep, tmp_path):
    """Twice from step 40 with other settings: what the second start trained was cut off by the third."""
    keep(tmp_path, config(1e-3), 0)
    keep(tmp_path, config(2e-3), 40)
    keep(tmp_path, config(3e-3), 40)
    assert configuration.load(tmp_path / "config.until_step_40.toml") == config(1e-3)
    assert configuration.load(tmp_path / "config.toml") == config(3e-3)


@pytest.mark.parametrize("broken", ["", "[optim", "optim = 1\n", "x = " + "9" * 5000])
def test_a_broken_file_stops_nothing(keep, tmp_path, broken):
    (tmp_path / "config.toml").write_text(broken)
    keep(tmp_path, config(), 40)
    assert configuration.load(tmp_path / "config.toml") == config()
