"""A step whose loss or gradient is NaN or infinite changes nothing, is named, and ends the run beyond a budget that a
restart does not renew.

One token's embedding is NaN, so exactly the steps on conversations with that token are bad.
"""

import shutil
from unittest import mock

import pytest
import torch

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import Manifest
from ochat.distributed import local_shards
from ochat.errors import NonFiniteError
from ochat.run import layout
from ochat.text import tokenizer as tokenizers
from ochat.text.token_weights import MAX_WEIGHT
from tests import pool, tiny

MARKED = {53: 1, 25: 5}  # conversation, counted from 0, with a token that no other has -> the step that it falls into
BAD = list(MARKED.values())
LIST = layout.NONFINITE
SAVE_ALL = ["--checkpoint.every=1", "--checkpoint.keep=0"]


def marked(folder, change):
    """A world in which `change` was made to the records of the marked conversations."""
    records = tiny.conversations()
    for number in MARKED:
        change(records[number])
    return tiny.make(folder, records)


def ask_about_z(record):
    question = record["items"][0]
    question["content"] = question["content"].replace("+", "z")  # as long as before: the order of the data stays


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    return marked(tmp_path_factory.mktemp("poisoned"), ask_about_z)


def broken(row):
    """checkpoint.load_base of a broken base: a row of its embedding is NaN."""
    plain = checkpoint.load_base

    def load_base(folder, model):
        plain(folder, model)
        first, end = local_shards.row_range(model.embed.weight)
        if first <= row < end:
            with torch.no_grad():
                local_shards.local_shard(model.embed.weight)[row - first] = torch.nan

    return load_base


@pytest.fixture
def nan_for_z(poisoned, monkeypatch):
    """What a broken base would give: one row of the embedding is NaN from the start."""
    (z,) = tokenizers.load(poisoned.base).encode("z")
    monkeypatch.setattr(checkpoint, "load_base", broken(z))


def train_broken(row, *arguments):
    """In a process of the pool."""
    with mock.patch.object(checkpoint, "load_base", broken(int(row))):
        pool.train(*arguments)


def state(run_dir, step):
    """Without the NaN row, which no comparison equals."""
    return {name: tensor.nan_to_num(12345.0) for name, tensor in tiny.state(run_dir, step).items()}


def skipped(lines):
    return [line["step"] for line in lines if line.get("skipped")]


def test_nonfinite_steps_change_no_bit_and_are_named(poisoned, nan_for_z, tmp_path, capsys):
    run_dir = tmp_path / "run"
    lines = tiny.train(poisoned, run_dir, "--train.max_nonfinite_steps=2", *SAVE_ALL)
    assert skipped(lines) == BAD and [line["step"] for line in lines] == list(range(1, 10))
    for line in lines:
        is_bad = line["step"] in BAD
        assert (line["loss"] is None) == (line["grad_norm"] is None) == is_bad and line["lr"] > 0
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()
    for step in range(2, 10):
        before, after = state(run_dir, step - 1), state(run_dir, step)
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) if step in BAD else not any(same)
    assert not any(tensor.any() for name, tensor in state(run_dir, 1).items() if name.startswith("exp_avg"))
    records = tiny.metrics(run_dir, LIST)
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in records] == [(step, "nan", "nan") for step in BAD]
    for number, record in zip(MARKED, records, strict=True):
        places = [place for places in record["bins"] for place in places]
        assert len(record["bins"]) == 4 and sum(p.endswith(f"conversations.jsonl:{number + 1}") for p in places) == 1
    said = capsys.readouterr().out
    assert said.count("WARNING step ") == 2 and "conversations.jsonl:54" in said
    assert "non-finite step 2 of at most 2" in said


def test_neither_reading_metrics_seldom_nor_a_restart_changes_a_skipping_run(poisoned, nan_for_z, tmp_path):
    whole = tiny.train(poisoned, tmp_path / "whole", "--train.max_nonfinite_steps=2", *SAVE_ALL)
    seldom = tiny.train(poisoned, tmp_path / "seldom", "--train.max_nonfinite_steps=2", "--train.log_every=4")
    assert tiny.curve(seldom) == tiny.curve(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for folder in layout.checkpoint_folders(tmp_path / "resumed")[3:]:
        shutil.rmtree(folder)
    resumed = tiny.train(poisoned, tmp_path / "resumed", "--train.max_nonfinite_steps=2")
    assert tiny.curve(resumed) == tiny.curve(whole)
    ends = [state(tmp_path / name, 9) for name in ("whole", "seldom", "resumed")]
    assert tiny.is_equal(ends[1], ends[0]) and tiny.is_equal(ends[2], ends[0])


def test_the_first_nonfinite_step_ends_a_run_by_default(poisoned, nan_for_z, tmp_path):
    what = r"step 1: loss nan, gradient norm nan; computed on bin 0: .*conversations\.jsonl:54, .*bin 3: "
    with pytest.raises(NonFiniteError, match=what + ".* resumes from the base, .*--train.max_nonfinite_steps=10"):
        tiny.train(poisoned, tmp_path / "run", *SAVE_ALL)
    assert [record["step"] for record in tiny.metrics(tmp_path / "run", LIST)] == [1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not layout.checkpoint_folders(tmp_path / "run")


def test_a_restart_does_not_renew_the_budget(poisoned, nan_for_z, tmp_path):
    """Also where the steps before were logged and checkpointed elsewhere, and where metrics are read seldom."""
    run_dir = tmp_path / "run"
    for more in ([], [], ["--train.log_every=3"]):
        what = r"step 5: .*non-finite step 2 and .*nonfinite_steps is 1\. .*/checkpoints/step_4\."
        with pytest.raises(NonFiniteError, match=what):
            tiny.train(poisoned, run_dir, "--train.max_nonfinite_steps=1", *SAVE_ALL, *more)
        assert [r["step"] for r in tiny.metrics(run_dir, LIST)] == BAD
        assert [line["step"] for line in tiny.metrics(run_dir)] == [1, 2, 3, 4]
    newest = layout.checkpoint_folders(run_dir)[-1]
    assert newest.name == "step_4" and Manifest.read(newest).skipped == 1
    with pytest.raises(NonFiniteError, match="step 5: .*non-finite step 2 "):
        tiny.train(poisoned, tmp_path / "branch", "--train.max_nonfinite_steps=1", f"--run.resume={newest}")
    lines = tiny.train(poisoned, run_dir, "--train.max_nonfinite_steps=2")
    assert skipped(lines) == BAD and len(lines) == 9


def test_where_backward_has_updated_weights_the_message_says_what_is_lost(poisoned, nan_for_z, tmp_path):
    options = ["--optim.in_backward=true", "--optim.clip=0", "--data.bins_per_step=1", "--train.log_every=2"]
    with pytest.raises(NonFiniteError, match="some weights were updated before it was seen.*resumes from the base"):
        tiny.train(poisoned, tmp_path / "run", *options)
    assert layout.checkpoint_folders(tmp_path / "run") == []


def test_two_processes_skip_the_same_steps(poisoned, nan_for_z, tmp_path):
    """The loss of one process is NaN: both leave the step out."""
    (z,) = tokenizers.load(poisoned.base).encode("z")

    def two(name, allowed, **how):
        options = tiny.options(poisoned, tmp_path / name, f"--train.max_nonfinite_steps={allowed}")
        return pool.run(2, "tests.run.test_nonfinite:train_broken", str(z), *options, **how)

    alone = tiny.train(poisoned, tmp_path / "alone", "--train.max_nonfinite_steps=2")
    assert skipped(alone) == BAD
    two("two", 2)
    lines = tiny.metrics(tmp_path / "two")
    assert skipped(lines) == BAD
    for ours, theirs in zip(lines, alone, strict=True):
        assert ours["step"] in BAD or ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    failed = two("stops", 1, check=False)
    assert failed.returncode and "NonFiniteError: step 5: loss nan" in failed.stderr
    assert "conversations.jsonl:26" in failed.stderr and "trainer.py" not in failed.stderr


def test_the_largest_weights_train_like_small_ones(tmp_path):
    """Weights are divided by their sum in float64, so that only ratios matter."""
    curves = []
    for name, weight in (("large", MAX_WEIGHT), ("small", 1.0)):
        records = tiny.conversations()
        for item in (item for record in records for item in record["items"] if item["role"] == "assistant"):
            item["weight"] = weight
        curves.append(tiny.train(tiny.make(tmp_path / name, records), tmp_path / f"{name}-run", "--data.max_steps=3"))
    for large, small in zip(*curves, strict=True):
        assert large["loss"] == pytest.approx(small["loss"], rel=1e-5) and large["grad_norm"] > 0
        assert large["grad_norm"] == pytest.approx(small["grad_norm"], rel=1e-4)
