"""Trackers: every number of a line arrives under its name; a tracker that is not installed is named with its remedy."""

import sys
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ochat.config import LogConfig
from ochat.errors import ConfigError
from ochat.train.display import Display

CLASS = {"loss": 0.5, "accuracy": None, "tokens": 7}
LINE = {"step": 3, "loss": 1.5, "accuracy": 0.25, "supervised_tokens": 7, "classes": {"GPT4": CLASS}}
NAMES = {"accuracy": 0.25, "classes/GPT4/loss": 0.5, "classes/GPT4/tokens": 7.0, "loss": 1.5, "supervised_tokens": 7.0}


def test_tensorboard_gets_every_number(tmp_path):
    for options in ({}, {"tensorboard": True}):
        assert not list(tmp_path.iterdir())
        display = Display(10, LogConfig(**options), tmp_path, "")
        display.steps([LINE | {"skipped": True}, LINE | {"step": 4, "loss": 1.25, "skipped": True}])
        display.evaluation(LINE)
        display.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = [f"held_out/{name}" for name in NAMES] + [f"train/{name}" for name in [*NAMES, "skipped"]]
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 1.5), (4, 1.25)]


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    """The first start was killed after step 4, behind its checkpoint of step 2."""
    for steps, done in (((1, 2, 3, 4), 0), ((3, 4, 5), 2)):
        display = Display(10, LogConfig(tensorboard=True), tmp_path, "", done=done)
        display.steps([LINE | {"step": step, "skipped": True} for step in steps])
        display.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_wandb_gets_every_number_of_a_step(tmp_path, monkeypatch):
    wandb, logged = mock.Mock(), {}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    display = Display(10, LogConfig(wandb="mine"), tmp_path, "[optim]\nlr = 1e-5\n")
    display.evaluation(LINE)
    display.close()
    settings, run = wandb.init.call_args.kwargs, wandb.init.return_value
    assert settings["project"] == "mine" and "[optim]" in settings["config"]["toml"]
    Display(10, LogConfig(wandb="mine"), tmp_path, "").close()
    Display(10, LogConfig(wandb="mine"), tmp_path.parent, "").close()
    first, again, other = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert first == again != other, "a start goes on in the run of the one before"
    for call in run.log.call_args_list:
        logged |= call.args[0]
        assert call.kwargs == {"step": 3}
    assert logged == {f"held_out/{name}": value for name, value in NAMES.items()}
    assert run.finish.call_count == 3


def test_further_sets_have_a_table_and_names_of_their_own(tmp_path, monkeypatch, capsys):
    wandb, logged = mock.Mock(), {}
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("COLUMNS", "80")
    exam = {"exact": 0.5, "prompts": 1200, "classes": {"GPT4": {"exact": 0.5, "prompts": 1200}}}
    sets = {"hard": {key: value for key, value in LINE.items() if key != "step"}, "exam": exam}
    for line in ({"step": 3, "sets": sets}, LINE | {"sets": sets}):
        display = Display(10, LogConfig(wandb="mine"), tmp_path, "")
        display.evaluation(line)
        display.close()
    for call in wandb.init.return_value.log.call_args_list:
        logged |= call.args[0]
    hard = {f"eval/hard/{name}": value for name, value in NAMES.items()}
    of_exam = {f"eval/exam/{name}": value for name, value in (("exact", 0.5), ("prompts", 1200.0))}
    of_class = {f"eval/exam/classes/GPT4/{name}": value for name, value in (("exact", 0.5), ("prompts", 1200.0))}
    assert logged == {f"held_out/{name}": value for name, value in NAMES.items()} | hard | of_exam | of_class
    printed = capsys.readouterr().out
    assert printed.count("held out, after step 3") == 1 and printed.count("exam, after step 3") == 2
    assert "1,200" in printed and "exact" in printed


STEP = LINE | {"lr": 2.5e-5, "tokens_per_s": 123456.0, "grad_norm": 1.25, "mfu": 0.41}


CLASSES = [["GPT4"], ["GPT4", "GPT3", "human", "web"], [f"GPT{i} Correct" for i in range(4)]]
CLASSES += [[f"a long name of class {i}" for i in range(4)], [f"{i} of many" for i in range(40)]]


@pytest.mark.parametrize("names", CLASSES)
@pytest.mark.parametrize("steps", [9, 120_000])
def test_a_step_has_its_losses_rate_and_speed_in_100_columns(tmp_path, caplog, names, steps):
    line = STEP | {"step": steps, "loss": 12.3456, "classes": {name: CLASS | {"loss": 12.3456} for name in names}}
    with caplog.at_level("INFO"):
        Display(steps, LogConfig(), tmp_path, "").steps([line])
    (said,) = caplog.messages
    assert len(said) <= 100 and said.startswith(f"step {steps}/{steps}  loss 12.346 (")
    assert "lr 2.5e-05  123k tok/s" in said
    if len(names) <= 4:
        assert said.count(" 12.35") == len(names) and (len(names) > 1 or " mfu 41%  acc 0.25" in said)


def test_a_cpu_shows_no_mfu(tmp_path, caplog):
    with caplog.at_level("INFO"):
        Display(3, LogConfig(), tmp_path, "", with_mfu=False).steps([STEP])
    assert "mfu" not in caplog.text and "|g| 1.25  acc 0.25" in caplog.text


@pytest.mark.parametrize(("log", "module"), [({"wandb": "mine"}, "wandb"), ({"tensorboard": True}, "tensorboard")])
def test_a_missing_tracker_is_named(tmp_path, monkeypatch, log, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    with pytest.raises(ConfigError, match=module):
        Display(10, LogConfig(**log), tmp_path, "")
