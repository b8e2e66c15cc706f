"""An evaluation may take long and fail: no step is lost by a signal or an error inside it, and the next start measures
what this one could not: pytest tests/train/test_stopped_evaluations.py"""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch

from ochat.checkpoint import best
from ochat.distributed.watchdog import SIGNALS
from ochat.errors import Interrupted
from ochat.run import layout
from ochat.train import trainer
from tests import pool, tiny

LAST = 18
NEVER = "--checkpoint.every=1000"


def options(world, *more: str) -> list[str]:
    samples = ['--samples.prompts=["1+1"]', "--samples.max_new_tokens=3"]
    return ["--data.epochs=2", "--train.eval_every=7", f"--data.eval_path={world.data}", *samples, *more]


@pytest.fixture(scope="module")
def whole(world):
    """A run that nothing disturbs."""
    tiny.train(world, world.folder / "whole", *options(world, NEVER))
    return world.folder / "whole"


def disturb(monkeypatch, name: str, at: int, fault) -> None:
    """Calls `fault` inside the evaluation after `at` steps: where the held-out loss or the samples begin."""
    plain = getattr(trainer.Trainer, name)

    def disturbed(self, *given):
        if self.steps_done == at:
            fault(self.ranks.rank)
        return plain(self, *given)

    monkeypatch.setattr(trainer.Trainer, name, disturbed)


def out_of_memory(*_) -> None:
    raise torch.OutOfMemoryError("made up")


def assert_as_whole(run, whole) -> None:
    assert tiny.curve(tiny.metrics(run)) == tiny.curve(tiny.metrics(whole))
    for name in (layout.EVAL, layout.SAMPLES):
        assert tiny.metrics(run, name) == tiny.metrics(whole, name), name
    assert (run / layout.EXPORT).is_dir()


@pytest.mark.parametrize("at", [0, 7, LAST])
@pytest.mark.parametrize(("name", "number"), list(zip(["held_out", "answers", "held_out"], SIGNALS, strict=True)))
def test_a_signal_inside_an_evaluation_stops_there(world, whole, tmp_path, monkeypatch, name, number, at):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        disturb(patched, name, at, lambda _: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=f"saved at step {at};" if at else "before the first step;") as stopped:
            tiny.train(world, run, *options(world, NEVER))
    assert stopped.value.exit_code == 128 + number
    assert [layout.step_of(folder) for folder in layout.checkpoint_folders(run)] == [at] * (at > 0)
    tiny.train(world, run, *options(world, NEVER))
    assert_as_whole(run, whole)


@pytest.mark.parametrize("name", ["held_out", "answers"])
@pytest.mark.parametrize(("every", "at"), [(1000, 7), (7, 7), (1000, LAST)])
def test_an_evaluation_that_fails_loses_no_step(world, whole, tmp_path, monkeypatch, capsys, every, at, name):
    run, more = tmp_path / "run", f"--checkpoint.every={every}"
    with monkeypatch.context() as patched:
        disturb(patched, name, at, out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            tiny.train(world, run, *options(world, more))
        assert f"the evaluation after step {at} failed (OutOfMemoryError)" in capsys.readouterr().out.replace("\n", " ")
        assert [layout.step_of(folder) for folder in layout.checkpoint_folders(run)] == [at]
        with pytest.raises(torch.OutOfMemoryError):  # it is measured before anything else
            tiny.train(world, run, *options(world, more))
    tiny.train(world, run, *options(world, more))
    assert_as_whole(run, whole)


def test_a_due_checkpoint_is_on_the_disk_before_its_evaluation_ends(world, tmp_path, monkeypatch):
    """As after SIGKILL, which nobody sees."""
    run, found = tmp_path / "run", []

    def look(_):
        deadline = time.monotonic() + 20
        while not found and time.monotonic() < deadline:
            found.extend(layout.checkpoint_folders(run))
            time.sleep(0.01)

    disturb(monkeypatch, "held_out", LAST, look)
    tiny.train(world, run, *options(world, NEVER))
    assert [layout.step_of(folder) for folder in found] == [LAST]


def test_a_part_of_an_evaluation_is_measured_again(world, whole, tmp_path):
    """Samples are written before the held-out numbers: a kill between both leaves them alone."""
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / layout.EXPORT)
    lines = (run / layout.EVAL).read_bytes().splitlines(keepends=True)
    (run / layout.EVAL).write_bytes(b"".join(lines[:-1]))
    tiny.train(world, run, *options(world, NEVER))
    assert_as_whole(run, whole)


def test_the_best_so_far_is_no_longer_kept_once_a_newer_one_is_better(world, tmp_path):
    """Though the newer one is saved before it is measured."""
    every = ["--checkpoint.every=7", "--checkpoint.keep=1", "--checkpoint.keep_best=true"]
    tiny.train(world, tmp_path / "run", *options(world, *every))
    assert best.best_step(tmp_path / "run") == LAST
    assert [layout.step_of(folder) for folder in layout.checkpoint_folders(tmp_path / "run")] == [LAST]


def train_disturbed(name: str, fault: str, at: str, *arguments: str) -> None:
    """`ochat train` on a rank of the pool."""
    faults = {
        "memory": out_of_memory,
        "signal": lambda rank: rank == 1 and os.kill(os.getpid(), signal.SIGUSR1),
    }
    with pytest.MonkeyPatch.context() as patched:
        disturb(patched, name, int(at), faults[fault])
        pool.train(*arguments)


@pytest.mark.parametrize(("name", "fault"), [("held_out", "memory"), ("held_out", "signal"), ("answers", "signal")])
def test_two_processes_lose_no_step_either(world, tmp_path, name, fault):
    """The error is of both, the signal of one."""
    run, words = tmp_path / "run", options(world, NEVER)
    place = "tests.train.test_stopped_evaluations:train_disturbed"
    done = pool.run(2, place, name, fault, "7", *tiny.options(world, run, *words), check=False)
    assert done.returncode in ((1,) if fault == "memory" else (128 + signal.SIGUSR1, 128 + signal.SIGTERM)), done
    assert [layout.step_of(folder) for folder in layout.checkpoint_folders(run)] == [7], done
    tiny.train_on_ranks(world, run, 2, *words)
    tiny.train_on_ranks(world, tmp_path / "whole", 2, *words)
    assert_as_whole(run, tmp_path / "whole")


def test_evaluations_add_no_graph_to_those_of_compiled_training(world, tmp_path, monkeypatch):
    """All blocks share one limit of graphs; behind it training goes on uncompiled."""
    graphs: list = []
    plain = torch.nn.Module.compile

    def counted(module):
        plain(module, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    monkeypatch.setattr(torch.nn.Module, "compile", counted)
    found = []
    for more in (options(world), ["--data.epochs=2"]):
        graphs.clear()
        torch._dynamo.reset()
        with torch._dynamo.config.patch(recompile_limit=100):
            tiny.train(world, tmp_path / str(len(found)), *more, "--data.max_steps=2", "--train.compile=true")
        found.append(len(graphs))
    assert found[0] == found[1] > 0
    assert (tmp_path / "0" / layout.SAMPLES).stat().st_size
