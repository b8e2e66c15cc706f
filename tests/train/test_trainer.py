"""Laws of a run: the same curve on any number of processes, bitwise the same after a signal, and clear refusals."""

import json
import os
import re
import shutil
import signal
import sys
import time

import pytest

from ochat.checkpoint.manifest import Manifest
from ochat.config import OptimConfig
from ochat.data.prepare import prepare
from ochat.errors import CheckpointError, ConfigError
from ochat.train.schedule import lr_at
from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, rank_of, started, wait_for

LINE = [
    "step", "epoch", "loss", "accuracy", "lr", "grad_norm", "tokens_per_s", "supervised_tokens_per_s",
    "padded_tokens_per_s", "mfu", "peak_mem_gib", "step_s", "tokens", "supervised_tokens", "classes",
]  # fmt: skip


def test_the_loss_falls_and_every_step_has_its_line(world, alone):
    assert [line["step"] for line in alone] == list(range(1, len(alone) + 1))
    assert alone[-1]["loss"] < 0.75 * alone[0]["loss"]
    for step, line in enumerate(alone):
        assert list(line) == LINE
        assert line["lr"] == lr_at(step, len(alone), OptimConfig(lr=3e-3, warmup_ratio=0.05, min_lr_ratio=0.1))
        assert line["padded_tokens_per_s"] >= line["tokens_per_s"] > line["supervised_tokens_per_s"] > 0
        assert 0 < line["mfu"] < 1 and line["classes"].keys() == {"GPT4", "GPT3"}
    config = (world.folder / "alone" / "config.toml").read_text()
    assert "token_budget = 96" in config and "clip = 1.0" in config  # resolved, defaults included


def test_each_epoch_ends_with_an_evaluation_and_samples(world, alone):
    lines = tiny.metrics(world.folder / "alone", "eval.jsonl")
    assert [line["step"] for line in lines] == [0, len(alone) // 2, len(alone)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    supervised = sum(line["supervised_tokens"] for line in alone) // 2
    assert all(line["supervised_tokens"] == supervised for line in lines)  # packing loses nothing
    samples = tiny.metrics(world.folder / "alone", "samples.jsonl")
    found = [(sample["step"], sample["condition"]) for sample in samples]
    assert found == [(line["step"], condition) for line in lines for condition in ("GPT4", "GPT3")]


@pytest.mark.parametrize(("processes", "replicate"), [(2, 1), (4, 2)])
def test_the_curve_is_the_same_on_any_number_of_processes(world, alone, processes, replicate, tmp_path):
    options = ["--data.epochs=2", f"--parallel.replicate={replicate}", f"--data.eval_path={world.data}"]
    samples = ['--samples.prompts=["1+1"]', "--samples.max_new_tokens=3"]
    tiny.train_on_ranks(world, tmp_path / "run", processes, *options, *samples)
    ours, theirs = tmp_path / "run", world.folder / "alone"
    for file, names in (("metrics.jsonl", ("grad_norm", "tokens")), ("eval.jsonl", ())):
        for found, expected in zip(tiny.metrics(ours, file), tiny.metrics(theirs, file), strict=True):
            for name in ("loss", "accuracy", "supervised_tokens", *names):
                assert found[name] == pytest.approx(expected[name], rel=1e-5 if name == "grad_norm" else 1e-6), name
    assert tiny.metrics(ours, "samples.jsonl") == tiny.metrics(theirs, "samples.jsonl")


def test_a_finished_run_has_nothing_left_to_do(world, alone, capsys):
    before = (world.folder / "alone" / "metrics.jsonl").read_text()
    capsys.readouterr()
    tiny.train(world, world.folder / "alone", "--data.epochs=2")
    assert (world.folder / "alone" / "metrics.jsonl").read_text() == before
    said = capsys.readouterr().out
    assert f"all {len(alone)} steps were done before: nothing is trained" in said
    assert f"next: ochat report {world.folder / 'alone'}" in said


def test_a_signal_saves_and_the_same_command_continues(world, tmp_path):
    run_dir, log, options = tmp_path / "run", tmp_path / "log", ["--data.epochs=12", "--checkpoint.every=1000"]
    with started(log, [sys.executable, "-m", "ochat.train", *tiny.options(world, run_dir, *options)]) as (process,):
        wait_for(process, (run_dir / "metrics.jsonl").exists, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM, log.read_text()
    assert "start the same command again" in log.read_text()
    saved = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert saved == [f"step_{len(tiny.metrics(run_dir))}"]
    lines = tiny.train(world, run_dir, *options)
    assert tiny.curve(lines) == tiny.curve(tiny.train(world, tmp_path / "whole", *options))


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(world, tmp_path):
    """The ranks agree over the hosts' network, independent of when they log."""
    options = ["--data.epochs=200", "--checkpoint.every=100000", "--train.log_every=100000"]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = tiny.torchrun_command(world, run_dir, 2, *options, "--train.eval_every=100000")
    with started(log, command) as (process,):
        wait_for(process, lambda: "mfu is of" in log.read_text(), log)  # the last line before the first step
        time.sleep(1)
        os.kill(next(pid for pid in descendants(process.pid) if rank_of(pid) == 1), signal.SIGUSR1)
        assert process.wait(120) != 0
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert saved.name == f"step_{len(tiny.metrics(run_dir))}"


COMPILED = pytest.param(1, ["--train.compile=true"], marks=pytest.mark.slow)


@pytest.mark.parametrize(("processes", "more"), [(1, ["--train.recompute=block"]), (2, []), COMPILED])
def test_the_triton_kernels_train_the_same(world, tmp_path, processes, more):
    options = ["--data.epochs=2", "--data.max_steps=3"]
    expected = tiny.train(world, tmp_path / "plain", *options)
    tiny.train_on_ranks(world, tmp_path / "run", processes, *options, "--train.kernels=triton", *more)
    lines = tiny.metrics(tmp_path / "run")
    for name in ("loss", "grad_norm", "accuracy"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-5)


def test_a_factor_of_all_weights_changes_no_loss(world, tmp_path):
    """The records' weights are 1 and 0.1, and so are those of these rewards."""
    found = []
    for classes in ([], ["GPT4.weight=20", "GPT3.weight=2"], ["GPT4.reward=1", "GPT3.reward=0.1"]):
        options = ["--data.max_steps=3", *(f"--classes.{each}" for each in classes)]
        found.append([line["loss"] for line in tiny.train(world, tmp_path / str(len(found)), *options)])
    assert found == [pytest.approx(found[0], rel=1e-5)] * 3


@pytest.mark.parametrize(
    ("option", "error", "needle"),
    [
        ("--data.token_budget=192", CheckpointError, "data.token_budget"),
        ("--data.bins_per_step=2", CheckpointError, "bins_per_step"),
        ("--data.path=OTHER", CheckpointError, "data set"),
        ("--run.resume=EARLY", CheckpointError, "holds the later step_"),
        ("--run.resume=never", ConfigError, "choose another --run.dir"),
    ],
)
def test_a_run_folder_of_another_run_is_refused_and_kept(world, alone, tmp_path, option, error, needle):
    folder = world.folder / "alone"
    option = option.replace("EARLY", str(folder / "checkpoints" / "step_5"))
    if "OTHER" in option:
        option = option.replace("OTHER", str(tiny.make(tmp_path / "other", tiny.conversations(40, seed=5)).data))
    before = (folder / "config.toml").read_text()
    with pytest.raises(error, match=needle):
        tiny.train(world, folder, "--data.epochs=2", option)
    assert (folder / "config.toml").read_text() == before


def test_what_does_not_belong_together_is_refused_before_the_first_step(world, tmp_path):
    chats, other, small = [world.folder / "conversations.jsonl"], tmp_path / "other_data", tmp_path / "small"
    dynamic, scaling = tmp_path / "dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    prepare(chats, world.base, "openchat_v3.2", other, conditions="ignore", progress=False)
    shutil.copytree(world.base, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 258}))
    shutil.copytree(world.base, dynamic)
    (dynamic / "config.json").write_text(json.dumps(config | scaling | {"max_position_embeddings": 16}))
    weights = "--classes.GPT4.weight={} --classes.GPT3.weight={}"
    for options, reason in (
        (weights.format(0, 0), "no token has a weight other than 0"),
        (weights.format(1, 0.1) + " --classes.GPT5.weight=1", "names 'GPT5'; the classes of .* are GPT4, GPT3"),
        ('--samples.conditions=["GPT5"]', "names 'GPT5'; the classes of .* are GPT4, GPT3"),
        (f"--data.eval_path={other}", "another template"),
        (f"--base.path={small}", "its embedding 258 rows.*--add-token"),
        (f"--base.path={dynamic}", "dynamic RoPE scaling .* prepare it with --context 16"),
    ):
        with pytest.raises(ConfigError, match=reason):
            tiny.train(world, tmp_path / "run", *options.split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


CONDITION = ["--condition.dropout=0.4", "--condition.last=0.3", "--data.epochs=2", "--checkpoint.keep=0"]


@pytest.mark.parametrize("first", [5, 10])  # before the cooldown, and in it
def test_dropout_and_cooldown_resume_bitwise(world, tmp_path, first):
    whole = tiny.train(world, tmp_path / "whole", *CONDITION, "--checkpoint.every=5")
    facts = json.loads((tmp_path / "whole" / "plan.json").read_text())["facts"]
    begins = int(
        re.fullmatch(r"left out of 40.0% .*; none in the last \d+ steps, from step (\d+) on", facts["condition"])[1]
    )
    assert begins < len(whole) == tiny.metrics(tmp_path / "whole")[-1]["step"] and (first < begins) == (first == 5)
    (tmp_path / "again" / "checkpoints").mkdir(parents=True)
    step = f"checkpoints/step_{first}"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "again" / step)
    again = tiny.train(world, tmp_path / "again", *CONDITION, "--checkpoint.every=5")
    assert tiny.curve(again) == tiny.curve(whole[first:])
    last = len(whole)
    assert tiny.is_equal(tiny.state(tmp_path / "again", last), tiny.state(tmp_path / "whole", last))
    with pytest.raises(CheckpointError, match="condition.dropout is 0.4 there and 0.2 here"):
        tiny.train(world, tmp_path / "again", *CONDITION, "--condition.dropout=0.2")


def test_a_cooldown_may_change_until_it_begins(world, tmp_path):
    """Also that of the only epoch, whose last steps it packs anew; the run goes on as one that always had it."""
    options = ["--data.epochs=1", "--checkpoint.every=2", "--checkpoint.keep=0"]
    last = "--condition.last=0.4"
    plain, cooled = tmp_path / "plain", tmp_path / "cooled"
    tiny.train(world, plain, *options)
    expected = tiny.train(world, cooled, *options, last)
    begins = Manifest.read(cooled / "checkpoints/step_2").identity["last step with conditions"]
    assert 2 <= begins < 6 <= len(expected), "step 2 is before the cooldown, step 6 in it"
    for run, changed in ((plain, [last]), (cooled, [])):
        shutil.copytree(run / "checkpoints/step_6", tmp_path / f"late_{run.name}" / "checkpoints/step_6")
        there, here = ("not set", begins) if changed else (begins, "not set")
        with pytest.raises(CheckpointError, match=f"last step with conditions is {there} there and {here} here"):
            tiny.train(world, tmp_path / f"late_{run.name}", *options, *changed)
    shutil.copytree(plain / "checkpoints/step_2", tmp_path / "early/checkpoints/step_2")
    assert tiny.curve(tiny.train(world, tmp_path / "early", *options, last)) == tiny.curve(expected[2:])


@pytest.mark.parametrize("processes", [2, 4])
def test_dropout_and_cooldown_are_the_same_on_any_number_of_processes(world, tmp_path, processes):
    expected = tiny.train(world, tmp_path / "alone", *CONDITION)
    tiny.train_on_ranks(world, tmp_path / "ranks", processes, *CONDITION)
    found = tiny.metrics(tmp_path / "ranks")
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-6)


def test_a_turns_class_weighs_its_answer_and_has_its_line(tmp_path):
    """The class of a turn decides its weight as a weight of its own would, and its metrics are its own."""
    records = tiny.conversations(40)
    for record in records:
        for message in record["items"]:
            message.pop("weight")
    mixed = [record for record in records if len(record["items"]) > 2]
    for record in mixed:
        record["items"][1]["condition"] = "GPT2"
    weigh = {"GPT4": 1.0, "GPT3": 0.1, "GPT2": 0.25}
    world = tiny.make(tmp_path / "world", records)
    classes = [f"--classes.{name}.weight={weight}" for name, weight in weigh.items()]
    ours = tiny.train(world, tmp_path / "classes", *classes)
    for record in records:
        for message in record["items"]:
            is_answer = message["role"] == "assistant"
            message["weight"] = weigh[message.get("condition", record["condition"])] if is_answer else 0.0
    world = tiny.make(tmp_path / "weighed", records)
    theirs = tiny.train(world, tmp_path / "record")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert [line["classes"] for line in ours] == [line["classes"] for line in theirs]
    assert sum(line["classes"]["GPT2"]["tokens"] for line in ours) == sum(
        len(record["items"][1]["content"]) + 1 for record in mixed
    )
    with pytest.raises(ConfigError, match="the data has the class 'GPT2', but"):
        tiny.train(world, tmp_path / "refused", *classes[:2])
