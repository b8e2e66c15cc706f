"""Laws of the evaluations of a run: they change no step, are the same on any number of processes and after a resume,
and end the run where they say; what cannot be measured is refused by name: pytest tests/train/test_evaluations.py"""

from __future__ import annotations

import json
import shutil

import pytest

from ochat.checkpoint.best import best_step
from ochat.commands import plan
from ochat.commands.report import ReportOptions
from ochat.commands.report import main as report
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.export.hf_folder import export
from ochat.run import layout
from ochat.text.conversation import Conversation, Message
from tests import tiny
from tests.evaluate.conftest import answer_alone

LEARNT = ["--data.epochs=6", "--optim.lr=1e-2", "--checkpoint.every=1000"]  # long enough for answers to end
LAST = 54  # its steps


def question(prompt: str, answer: str, condition: str = "GPT3") -> dict:
    items = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"items": items, "condition": condition}


@pytest.fixture(scope="module")
def bare(world):
    """A run that measures nothing."""
    tiny.train(world, world.folder / "bare", *LEARNT)
    return world.folder / "bare"


@pytest.fixture(scope="module")
def asked(bare, tmp_path_factory):
    """(file, the share of right answers under GPT4): the trained model's own answers to some questions, blanks around
    them, and wrong ones; the records are of the other class."""
    folder = tmp_path_factory.mktemp("asked")
    export(bare, folder / "model", dtype="float32")
    records, num_right = [], 0
    for number in range(20):  # more than a batch
        text, is_cut = answer_alone(folder / "model", Conversation((Message("user", f"{number}+1"),), "GPT4"), 8)
        is_right = number % 3 > 0 and not is_cut and bool(text.strip())
        records.append(question(f"{number}+1", f" {text}\n" if is_right else "wrong"))
        num_right += is_right
    assert 0 < num_right < 20
    return tiny.write_lines(folder / "exam.jsonl", records), num_right / 20


def evaluated(world, asked) -> list[str]:
    return [
        *LEARNT, f"--data.eval_path={world.data}", f"--eval.again.path={world.data}", f"--eval.exam.path={asked[0]}",
        "--eval.exam.task=exact", "--eval.exam.max_new_tokens=8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(world, asked):
    """A run with two sets and a task, else as `bare`."""
    tiny.train(world, world.folder / "evaluated", *evaluated(world, asked))
    return world.folder / "evaluated"


def test_evaluations_change_no_bit_of_training(bare, run):
    assert tiny.curve(tiny.metrics(run)) == tiny.curve(tiny.metrics(bare))
    assert tiny.is_equal(tiny.state(run, LAST), tiny.state(bare, LAST))
    assert not (bare / layout.EVAL).exists() and not (bare / layout.ANSWERS).exists()


def test_a_line_has_the_first_set_as_before_and_the_others_under_their_names(run):
    lines = tiny.metrics(run, layout.EVAL)
    assert len(lines) == 7
    for line in lines:
        assert list(line) == ["step", "loss", "accuracy", "supervised_tokens", "classes", "sets"]
        sets = line.pop("sets")
        assert list(sets) == ["again", "exam"]
        assert sets["again"] == {key: value for key, value in line.items() if key != "step"}


def test_a_task_counts_the_answers_that_the_trained_model_gives(asked, run):
    """Which is the model that `asked` was made with, since evaluations change no bit of it."""
    lines, answers = tiny.metrics(run, layout.EVAL), tiny.metrics(run, layout.ANSWERS)
    for line in lines:
        found = [answer for answer in answers if answer["step"] == line["step"]]
        share = sum(answer["is_right"] for answer in found) / len(found)
        row = {"exact": share, "prompts": 20}
        assert line["sets"]["exam"] == row | {"classes": {"GPT4": row}} and {each["set"] for each in found} == {"exam"}
        assert [each["source"] for each in found] == [f"{asked[0]}:{number}" for number in range(1, 21)]
        for each in found:
            assert each["is_right"] == (not each["is_cut"] and each["answer"].strip() == each["expected"].strip())
    assert lines[-1]["sets"]["exam"]["exact"] == asked[1]


def test_on_two_processes_the_same_is_measured(world, asked, run, tmp_path):
    tiny.train_on_ranks(world, tmp_path / "run", 2, *evaluated(world, asked))
    for ours, theirs in zip(tiny.metrics(tmp_path / "run", layout.EVAL), tiny.metrics(run, layout.EVAL), strict=True):
        assert ours["sets"]["exam"] == theirs["sets"]["exam"]
        assert ours["sets"]["again"]["loss"] == ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert tiny.metrics(tmp_path / "run", layout.ANSWERS) == tiny.metrics(run, layout.ANSWERS)


def test_the_report_shows_every_set_and_the_best_of_it(run):
    report(ReportOptions((run,)))
    page = (run / "report.html").read_text()
    exact = tiny.metrics(run, layout.EVAL)[-1]["sets"]["exam"]["exact"]
    for text in ("again: GPT4 loss", "exam: GPT4 exact", "exam: exact match", f"{exact:.1%}", "again: accuracy"):
        assert text in page, text


RISING = ["--optim.lr=0.2", "--train.eval_every=2", "--checkpoint.every=4", "--checkpoint.keep=0", "--data.epochs=4"]
STOPS = [*RISING, "--train.stop_after=2", "--checkpoint.best=again.loss.GPT4"]


@pytest.fixture(scope="module")
def stopped(world):
    """A run whose losses rise after the first, so that it ends long before its last step."""
    folder = world.folder / "stopped"
    tiny.train(world, folder, *STOPS, f"--eval.again.path={world.data}")
    return folder


def test_a_run_that_gets_no_better_ends_as_at_its_last_step(world, stopped, capsys):
    losses = [line["sets"]["again"]["classes"]["GPT4"]["loss"] for line in tiny.metrics(stopped, layout.EVAL)]
    best = losses.index(min(losses))
    assert best > 0 and len(losses) == best + 3 and len(tiny.metrics(stopped)) == 2 * (best + 2)
    newest = layout.checkpoint_folders(stopped)[-1]
    assert layout.step_of(newest) == 2 * (best + 2)
    assert json.loads((stopped / layout.EXPORT / "openchat.json").read_text())["step"] == layout.step_of(newest)
    before = (stopped / layout.METRICS).read_text()
    capsys.readouterr()
    tiny.train(world, stopped, *STOPS, f"--eval.again.path={world.data}")
    assert (stopped / layout.METRICS).read_text() == before
    assert "2 evaluations in a row were no better than the lowest loss of GPT4 in again" in capsys.readouterr().out
    report(ReportOptions((stopped,)))
    assert 'class="state ended"' in (stopped / "report.html").read_text()


def test_a_killed_run_ends_where_it_would_have_and_has_the_same_best(world, stopped, tmp_path):
    """A kill leaves lines behind its newest checkpoint."""
    for step in [layout.step_of(folder) for folder in layout.checkpoint_folders(stopped)][:-1]:
        killed = shutil.copytree(stopped, tmp_path / str(step))
        shutil.rmtree(killed / layout.EXPORT)
        for folder in layout.checkpoint_folders(killed):
            if layout.step_of(folder) > step:
                shutil.rmtree(folder)
        tiny.train(world, killed, *STOPS, f"--eval.again.path={world.data}")
        assert (killed / layout.EVAL).read_text() == (stopped / layout.EVAL).read_text()
        assert tiny.curve(tiny.metrics(killed)) == tiny.curve(tiny.metrics(stopped))
        assert best_step(killed) == best_step(stopped) and (killed / layout.EXPORT).is_dir()


def test_two_processes_end_after_the_same_step(world, stopped, tmp_path):
    tiny.train_on_ranks(world, tmp_path / "run", 2, *STOPS, f"--eval.again.path={world.data}")
    assert len(tiny.metrics(tmp_path / "run")) == len(tiny.metrics(stopped))
    assert best_step(tmp_path / "run") == best_step(stopped)


def test_with_more_patience_it_goes_on_as_if_it_had_never_ended(world, stopped, tmp_path):
    run, options = shutil.copytree(stopped, tmp_path / "run"), [*RISING, f"--eval.again.path={world.data}"]
    lines = tiny.train(world, run, *options, "--train.stop_after=0")
    whole = tiny.train(world, tmp_path / "whole", *options)
    assert len(lines) > len(tiny.metrics(stopped)) and tiny.curve(lines) == tiny.curve(whole)


@pytest.mark.parametrize(
    ("option", "needle"),
    [
        ("--checkpoint.best=loss", "checkpoint.best = 'loss': expected SET.loss"),
        ("--checkpoint.best=hard.loss", "no held-out set is called 'hard'; there is held_out, exam"),
        ("--checkpoint.best=exam.loss", "of exam there is exact"),
        ("--checkpoint.best=held_out.exact", "of held_out there is loss and accuracy"),
        (
            "--checkpoint.best=held_out.loss.all",
            "held_out has no class 'all'; it has GPT., GPT., and without a class all",
        ),
        ("--checkpoint.best=exam.exact.GPT3", "exam has no class 'GPT3'; it has GPT4"),
        ('--eval.exam.conditions=["GPT5"]', "eval.exam.conditions names 'GPT5'; the classes of .* are GPT4, GPT3"),
    ],
)
def test_what_is_not_measured_is_refused_before_the_first_step(world, tmp_path, option, needle):
    exam = tiny.write_lines(tmp_path / "exam.jsonl", [question("1+1", "2")])
    task = [f"--data.eval_path={world.data}", "--eval.exam.task=exact", f"--eval.exam.path={exam}"]
    with pytest.raises(ConfigError, match=needle):
        tiny.train(world, tmp_path / "run", *task, option)
    with pytest.raises(ConfigError, match=needle):
        plan.main(plan.PlanOptions(world.config), [*task, option])
    assert not (tmp_path / "run" / layout.METRICS).exists()


def test_a_set_of_another_template_is_refused(world, tmp_path):
    prepare(
        [world.folder / "conversations.jsonl"],
        world.base,
        "openchat_v3.2",
        tmp_path / "other",
        conditions="ignore",
        progress=False,
    )
    with pytest.raises(ConfigError, match="another template"):
        tiny.train(world, tmp_path / "run", f"--eval.other.path={tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("record", "more", "needle"),
    [
        ({"items": question("1+1", "2")["items"][:1]}, "", "expected a question and, as the last message"),
        (question("1+1", " "), "", "expected a question and, as the last message"),
        (
            question("1+1", "abcdefgh"),
            "--eval.exam.max_new_tokens=8",
            "the answer and its end have 9 tokens: .* = 8 none",
        ),
        (question("x" * 500, "2"), "", "prompt and answer have 5.. tokens, but the model's context is 512"),
        ({"nothing": 1}, "", "record"),
    ],
)
def test_a_record_that_asks_nothing_is_named_by_file_and_line(world, tmp_path, record, more, needle):
    exam = tiny.write_lines(tmp_path / "exam.jsonl", [question("1+1", "2"), record])
    options = ["--eval.exam.task=exact", f"--eval.exam.path={exam}", *more.split()]
    with pytest.raises(DataError, match=rf"exam\.jsonl:2: .*{needle}"):
        tiny.train(world, tmp_path / "run", *options)
