"""`ochat check` refuses what training refuses, in the same words: pytest tests/train/test_check.py"""

import shutil
import subprocess
import sys

import pytest

from ochat.commands import check
from ochat.commands.check import CheckOptions
from ochat.errors import OchatError
from tests import tiny

CASES = {
    "a data set that is not there": ["--data.path=nowhere"],
    "a base that is not there": ["--base.path=nowhere"],
    "a class that the data lacks": ["--samples.conditions=[\"GPT9\"]"],
    "weights of a class that the data lacks": ["--classes.GPT9.reward=1"],
    "a conversation longer than a bin": ["--data.token_budget=8"],
    "no token of any weight": ["--classes.GPT3.weight=0", "--classes.GPT4.weight=0"],
    "a checkpoint that is not there": ["--run.resume=nowhere"],
    "what decides, without a set": ["--checkpoint.best=held_out.loss"],
    "a held-out set that is not there": ["--data.eval_path=nowhere"],
    "copies of the model on one process": ["--parallel.replicate=2"],
    "weights on the host of one process": ["--parallel.offload=all"],
    "a tracker that is not installed": ["--log.wandb=mine"],
    "kernels of another device": ["--train.kernels=triton"],
    "attention of another device": ["--train.attention=fa4"],
}  # fmt: skip


def refusal(function, *arguments):
    with pytest.raises((OchatError, OSError)) as refused:
        function(*arguments)
    return type(refused.value), str(refused.value)


def assert_same(world, run_dir, *options):
    """Training and checking say the same, which is returned."""
    config, *overrides = tiny.options(world, run_dir, *options)
    checked = refusal(check.main, CheckOptions(config), overrides)
    assert checked == refusal(tiny.train, world, run_dir, *options)
    return checked[1]


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_what_training_refuses_is_refused(world, tmp_path, options):
    assert assert_same(world, tmp_path / "run", *options)


def test_damaged_files_are_refused(world, tmp_path):
    for key, folder, pattern in (("data", world.data, "*.bin"), ("base", world.base, "*.safetensors")):
        copy = tmp_path / key
        shutil.copytree(folder, copy)
        tiny.flip(next(path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size > 2000))
        assert str(copy) in assert_same(world, tmp_path / "run", f"--{key}.path={copy}"), pattern


def test_a_run_that_belongs_to_other_data_is_refused(world, alone, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(world.folder / "alone", copy)
    assert "data.token_budget" in assert_same(world, copy, "--data.token_budget=128")
    assert "run.resume is 'never'" in assert_same(world, copy, "--run.resume=never")


def test_a_folder_that_cannot_be_the_run_s_is_refused(world, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in assert_same(world, tmp_path / "file")
    program = "import sys, time\nfrom pathlib import Path\nfrom ochat.run.lock import folder_lock\n"
    program += f"with folder_lock(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=tiny.environment())
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        assert f"another run works there: process {holder.pid}" in assert_same(world, tmp_path)
    finally:
        holder.kill()
        holder.wait()


def test_bins_that_the_gpus_cannot_share_and_updates_that_need_one_are_refused(world, tmp_path):
    config, *overrides = tiny.options(world, tmp_path / "run")
    assert "use a multiple of 3" in refusal(check.main, CheckOptions(config, gpus=3), overrides)[1]
    alone = ["--optim.in_backward=true", "--optim.clip=0", "--data.bins_per_step=2"]
    assert refusal(check.main, CheckOptions(config, nodes=2), [*overrides, *alone])[1]


def test_a_run_that_would_start_leaves_no_trace_and_is_told_how(world, tmp_path, capsys):
    config, *overrides = tiny.options(world, tmp_path / "a folder" / "run", "--data.epochs=2")
    check.main(CheckOptions(config, gpus=2), overrides)
    printed = capsys.readouterr().out
    assert "`ochat train` would start: 18 steps of 4 x 96 tokens" in printed
    assert printed.splitlines()[-1] == f"next: ochat train {config} --gpus 2 '{overrides[0]}' --data.epochs=2"
    assert not list(tmp_path.iterdir())
