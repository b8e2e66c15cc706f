"""Trackers: every number of a line arrives under its name; a tracker that is not installed is named with its remedy."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ochat.config import LogConfig
from ochat.errors import ConfigError
from ochat.train.trackers import Trackers

LINE = {"step": 3, "loss": 1.5, "classes": {"GPT4": {"loss": 0.5, "accuracy": None, "tokens": 7}}}


def open_trackers(run_dir, enabled=True, **log):
    return Trackers(LogConfig(**log), run_dir, "[optim]\nlr = 1e-5\n", enabled=enabled)


def test_tensorboard_gets_every_number_of_the_first_rank(tmp_path):
    for enabled in (False, True):
        assert not list(tmp_path.iterdir())
        trackers = open_trackers(tmp_path, enabled=enabled, tensorboard=True)
        trackers.add("train", [LINE, LINE | {"step": 4, "loss": 1.25}])
        trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/classes/GPT4/loss", "train/classes/GPT4/tokens", "train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5), (4, 1.25)]


def test_wandb_gets_every_number_of_a_step(tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, numbers, step):
            logged.append((step, numbers))

        def finish(self):
            logged.append("finished")

    class Wandb:
        @staticmethod
        def init(**settings):
            assert settings["project"] == "mine" and "[optim]" in settings["config"]["toml"]
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    trackers = open_trackers(tmp_path, wandb="mine")
    trackers.add("held_out", [LINE])
    trackers.close()
    expected = {"held_out/loss": 1.5, "held_out/classes/GPT4/loss": 0.5, "held_out/classes/GPT4/tokens": 7.0}
    assert logged == [(3, expected), "finished"]


@pytest.mark.parametrize(("log", "module"), [({"wandb": "mine"}, "wandb"), ({"tensorboard": True}, "tensorboard")])
def test_a_missing_tracker_is_named(tmp_path, monkeypatch, log, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=module):
        open_trackers(tmp_path, **log)
