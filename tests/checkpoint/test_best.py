"""Picking a checkpoint: the best held-out loss of the expert class, among those that are there, or plain words why
not: pytest tests/checkpoint/test_best.py"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat import cli
from ochat.checkpoint.best import best_checkpoint, best_evaluation, decisive_measure, no_better, read_evaluations
from ochat.checkpoint.measure import Measure, measures
from ochat.commands.export import ExportOptions, best_table, main
from ochat.errors import CheckpointError, ConfigError
from ochat.run import layout
from tests import tiny

WEIGHED = '[base]\npath = "b"\n[data]\npath = "d"\n[classes.GPT4]\nreward = 1.0\n[classes.GPT3]\nreward = 0.1\n'


def measured(run: Path, losses: dict[int, tuple[float | None, float]], kept: tuple[int, ...], config: str = "") -> Path:
    """A run folder with held-out losses of (GPT4, GPT3) by step, and empty checkpoint folders."""
    run.mkdir(exist_ok=True)
    with (run / "eval.jsonl").open("w") as file:
        for step, (four, three) in losses.items():
            rows = {"GPT4": {"loss": four, "accuracy": 0.5}, "GPT3": {"loss": three, "accuracy": 0.25}}
            file.write(json.dumps({"step": step, "loss": three, "accuracy": 0.5, "classes": rows}) + "\n")
    (run / "config.toml").write_text(config or WEIGHED)
    for step in kept:
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    return run


LOSSES = {0: (5.0, 4.0), 10: (2.0, 1.0), 20: (1.5, 1.2), 30: (1.5, 0.9), 40: (1.75, 1.1)}


def test_the_best_is_the_earliest_of_the_lowest_losses_of_the_heaviest_class(tmp_path):
    run = measured(tmp_path / "run", LOSSES, (10, 20, 30))
    choice = best_checkpoint(run)
    assert choice.folder.name == "step_20" and choice.step == 20
    shown = [list(column.cells) for column in best_table("", choice, {10, 20, 30}).columns]
    assert shown[0] == ["0  ", "10  ", "20 *", "30  ", "40  "], "every evaluation, also where the checkpoint is gone"
    assert shown[1] == ["5.0000", "2.0000", "1.5000", "1.5000", "1.7500"]
    assert shown[-1] == ["-", "yes", "yes", "yes", "-"]
    assert best_checkpoint(run, "GPT3").step == best_checkpoint(run, "all").step == 30
    with pytest.raises(ConfigError, match="no held-out loss of that name; there is .*GPT4"):
        best_checkpoint(run, "GPT5")


@pytest.mark.parametrize(
    ("change", "served", "wanted"),
    [
        (("reward = 0.1", "reward = 1.5"), "GPT4", "GPT3"),  # the table decides
        (("reward = 0.1", "reward = 1.0"), "GPT3", "GPT3"),  # the same weight: what the run serves
        (("[classes.GPT4]", '[weights]\nsource = "none"\n[classes.GPT4]'), "GPT3", "GPT3"),  # the table is not used
        (("reward = 0.1", "reward = nonsense"), "GPT3", "GPT3"),
        (("reward = 0.1", "reward = nonsense"), "GPT5", "all"),  # served, and never measured
        (("reward = 0.1", "reward = nonsense"), "", "all"),
        (("reward = 0.1", "reward = nonsense"), ["GPT4"], "all"),
    ],
)
def test_the_expert_is_the_heaviest_class_else_the_one_that_is_served(tmp_path, change, served, wanted):
    run = measured(tmp_path / "run", LOSSES, (), WEIGHED.replace(*change))
    if served:
        (run / "serving").mkdir()
        (run / "serving" / "openchat.json").write_text(json.dumps({"template": {"default_condition": served}}))
    name = None if wanted == "all" else wanted
    assert decisive_measure(run, read_evaluations(run)) == Measure("held_out", "loss", name)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    run = measured(tmp_path / "run", {10: (None, 1.0), 20: (float("nan"), 1.0), 30: (3.0, 1.0)}, (10, 20, 30))
    found, four = read_evaluations(run), Measure("held_out", "loss", "GPT4")
    assert [each.numbers[four] for each in found] == [None, None, 3.0]
    assert best_evaluation(found, four).step == 30 and best_evaluation(found[:2], four) is None  # type: ignore[union-attr]
    with (run / "eval.jsonl").open("a") as file:
        file.write('{"step": 40, "loss": 0.1, "cla')
    assert len(read_evaluations(run)) == 3


def test_what_cannot_be_chosen_is_said(tmp_path):
    run = measured(tmp_path / "gone", LOSSES, (10, 40))
    with pytest.raises(
        CheckpointError, match=r"1\.5000, is that of step 20, .*The best that is there is step 40: ochat"
    ):
        best_checkpoint(run)
    run = measured(tmp_path / "worse", {0: (1.0, 1.0), 10: (2.0, 1.0)}, (10,))
    with pytest.raises(CheckpointError, match="the base itself before its first step"):
        best_checkpoint(run)
    (run / "eval.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"no held-out numbers to choose by; train with data\.eval_path"):
        best_checkpoint(run)
    with pytest.raises(ConfigError, match="give the run's folder"):
        best_checkpoint(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="add --best"):
        main(ExportOptions(run, tmp_path / "out", best_by="GPT4"))


def test_a_run_keeps_its_best_checkpoint_beside_the_newest_and_exports_it(world, tmp_path, monkeypatch, capsys):
    """The losses are made up: lowest at the second of five saves."""
    made_up = iter([9.0, 3.0, 1.0, 2.0, 1.5, 4.0])

    def held_out(*_):
        loss = next(made_up)
        row = {"loss": loss, "accuracy": 0.5, "tokens": 1}
        return {"loss": loss, "accuracy": 0.5, "supervised_tokens": 1, "classes": {"GPT4": row, "GPT3": row}}

    monkeypatch.setattr("ochat.train.trainer.Trainer.held_out", held_out)
    options = ["--data.max_steps=5", "--checkpoint.every=1", "--train.eval_every=1", "--checkpoint.keep=1"]
    options += [f"--data.eval_path={world.data}", "--checkpoint.keep_best=true"]
    tiny.train(world, tmp_path / "run", *options)
    assert [path.name for path in layout.checkpoint_folders(tmp_path / "run")] == ["step_2", "step_5"]
    capsys.readouterr()
    cli.run("export", [str(tmp_path / "run"), str(tmp_path / "out"), "--best"])
    printed = capsys.readouterr().out
    assert "2 * " in printed and "1.0000" in printed and "4.0000" in printed and "exported step 2 to" in printed
    assert json.loads((tmp_path / "out" / "openchat.json").read_text())["step"] == 2
    with pytest.raises(ConfigError, match="give the run's folder"):
        main(ExportOptions(tmp_path / "run" / "checkpoints" / "step_5", tmp_path / "other", best=True))


def test_with_the_defaults_every_epoch_is_measured_and_saved(world, tmp_path):
    tiny.train(world, tmp_path / "run", "--data.epochs=3", f"--data.eval_path={world.data}", "--checkpoint.keep=0")
    ends = [line["step"] for line in tiny.metrics(tmp_path / "run", "eval.jsonl")]
    kept = [layout.step_of(folder) for folder in layout.checkpoint_folders(tmp_path / "run")]
    assert len(kept) == 3 and ends == [0, *kept]
    assert all(each.checkpoint for each in read_evaluations(tmp_path / "run")[1:])


FURTHER = {
    "hard": {"loss": 2.0, "accuracy": 0.5, "classes": {"GPT-3.5": {"loss": 3.0, "accuracy": 0.25, "tokens": 4}}},
    "a set.": {"exact": 0.5, "prompts": 2, "classes": {"all": {"exact": 0.5, "prompts": 2}}},
}


def test_every_number_of_a_line_has_a_name_that_is_read_back():
    line = {
        "step": 1,
        "loss": 1.0,
        "accuracy": 0.5,
        "classes": {"GPT4": {"loss": 4.0, "accuracy": None}},
        "sets": FURTHER,
    }
    wanted = {
        "held_out.loss": 1.0, "held_out.accuracy": 0.5, "held_out.loss.GPT4": 4.0, "held_out.accuracy.GPT4": None,
        "hard.loss": 2.0, "hard.accuracy": 0.5, 'hard.loss."GPT-3.5"': 3.0, 'hard.accuracy."GPT-3.5"': 0.25,
        '"a set.".exact': 0.5, '"a set.".exact.all': 0.5,
    }  # fmt: skip
    assert {str(measure): value for measure, value in measures(line).items()} == wanted
    assert [Measure.parse(text, "x") for text in wanted] == list(measures(line))


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(names, st.sampled_from(["loss", "accuracy", "exact"]), st.none() | names)
def test_a_measure_of_any_name_is_read_back(of, kind, name):
    measure = Measure(of, kind, name)
    assert Measure.parse(str(measure), "x") == measure


@pytest.mark.parametrize("text", ["", "loss", "held_out", "held_out.los", "a.b.c.d", "a = 1\nb", "held_out.loss.a.b"])
def test_what_names_no_measure_is_refused(text):
    with pytest.raises(ConfigError, match="checkpoint.best = .*: expected SET.loss"):
        Measure.parse(text, "checkpoint.best")


def test_a_run_chooses_by_any_number_of_any_set_and_a_class_called_all_confuses_nothing(tmp_path):
    run = tmp_path / "run"
    measured(run, LOSSES, tuple(LOSSES), WEIGHED + "[checkpoint]\nbest = 'exam.exact.GPT4'\n")
    shares, lines = {0: 0.0, 10: 0.5, 20: 0.25, 30: 0.5, 40: 0.25}, []
    for line in tiny.metrics(run, "eval.jsonl"):
        share = shares[line["step"]]
        line["sets"] = {"exam": {"exact": 1 - share, "prompts": 4, "classes": {"GPT4": {"exact": share, "prompts": 4}}}}
        lines.append(line)
    tiny.write_lines(run / "eval.jsonl", lines)
    choice = best_checkpoint(run)
    assert (choice.step, str(choice.by)) == (10, "exam.exact.GPT4"), "the highest share, the earlier of two equal ones"
    table = best_table("", choice, set(LOSSES))
    assert [column.header for column in table.columns] == ["step", "GPT4\nexact", "all\nexact", "kept"]
    assert list(table.columns[1].cells) == ["0.0%", "50.0%", "25.0%", "50.0%", "25.0%"]
    for by, step in {"exam.exact": 0, "GPT4": 20, "all": 30, "held_out.loss.GPT3": 30, "held_out.accuracy": 0}.items():
        assert best_checkpoint(run, by).step == step, by
    with pytest.raises(ConfigError, match="--best-by exam.exact.GPT5: .* there is GPT4, GPT3, all, or held_out.loss, "):
        best_checkpoint(run, "exam.exact.GPT5")
    for line in lines:
        line["classes"]["all"] = {"loss": -line["step"], "accuracy": 0.5}
    tiny.write_lines(run / "eval.jsonl", lines)
    with pytest.raises(ConfigError, match="there is a class of that name; say held_out.loss or held_out.loss.all"):
        best_checkpoint(run, "all")
    assert (best_checkpoint(run, "held_out.loss").step, best_checkpoint(run, "held_out.loss.all").step) == (30, 40)


def test_a_run_without_a_measured_expert_says_what_there_is(tmp_path):
    run = measured(tmp_path / "run", {}, (5,))
    tiny.write_lines(run / "eval.jsonl", [{"step": 5, "sets": FURTHER}])
    with pytest.raises(
        ConfigError, match="no evaluation has held_out.loss; choose with --best-by, there is hard.loss, "
    ):
        best_checkpoint(run)
    assert best_checkpoint(run, "hard.accuracy").step == 5


def test_a_run_ends_after_evaluations_that_are_no_better(tmp_path):
    """A tie is no better; a number that is missing is none either; the base counts."""
    losses = {0: (5.0, 1.0), 10: (2.0, 1.0), 20: (2.0, 1.0), 30: (None, 1.0), 40: (2.5, 1.0), 50: (1.0, 1.0)}
    found = []
    for most in (1, 3, 4):
        for last in losses:
            run = measured(tmp_path / f"{most}-{last}", {step: losses[step] for step in losses if step <= last}, ())
            found.append((most, last, bool(no_better(run, most))))
    assert [(most, last) for most, last, is_over in found if is_over] == [(1, 20), (1, 30), (1, 40), (3, 40)]
    run = measured(tmp_path / "said", {0: (2.0, 1.0), 5: (3.0, 1.0), 9: (3.0, 1.0)}, ())
    wanted = "2 evaluations in a row were no better than the lowest held-out loss of GPT4, 2.0000 after step 0"
    assert no_better(run, 2) == wanted and not no_better(measured(tmp_path / "none", {}, ()), 1)
