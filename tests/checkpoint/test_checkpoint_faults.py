"""What really happens to a run: killed at any moment, its disk full, its processes of another number.

`pytest -m slow tests/checkpoint/test_checkpoint_faults.py` kills twenty times instead of five.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from ochat.checkpoint.manifest import verify_checkpoint
from ochat.distributed.processes import Ranks
from ochat.files import jsonl
from ochat.run import layout
from tests import tiny

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def descendants(pid):
    """A process and all that it started, also those in sessions of their own, as torchrun's workers are."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(below for child in found for below in descendants(int(child)))]


def kill(process):
    """SIGKILL for the whole job at once: nobody gets to clean up."""
    job = descendants(process.pid) if process.poll() is None else []
    tell(job, signal.SIGSTOP)
    tell(job, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def started(log, *commands, **environment):
    """The processes of these commands, side by side, which write to the log; killed at the end in any case."""
    options = {"cwd": tiny.ROOT, "env": tiny.environment() | environment}
    with log.open("a") as output:
        processes = [subprocess.Popen(command, stdout=output, stderr=output, **options) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            kill(process)


def tell(job, number):
    for pid in job:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stop_while_saving(process, run_dir):
    """Halts all processes of the job at a moment when a checkpoint is half written."""
    job = descendants(process.pid)
    while process.poll() is None:
        if any((run_dir / "checkpoints").glob(".step_*.tmp/*")):
            tell(job, signal.SIGSTOP)
            if any((run_dir / "checkpoints").glob(".step_*.tmp/*")):
                return
            tell(job, signal.SIGCONT)  # it was done before it could be halted


def newest(run_dir):
    there = layout.checkpoint_folders(run_dir)
    return int(there[-1].name[5:]) if there else 0


def run_until_killed(command, run_dir, draw, *, saving):
    """Starts the job and kills it: while a checkpoint is half written, or a random time after it got one further.
    Returns where it stood and whether a half-written folder was left."""
    start, log = newest(run_dir), run_dir.with_suffix(".log")
    with started(log, command) as (process,):
        wait_for(process, lambda: newest(run_dir) > start, log)
        time.sleep(draw.uniform(0, 0.1))
        if saving:
            stop_while_saving(process, run_dir)
    return newest(run_dir), bool(list((run_dir / "checkpoints").glob(".step_*.tmp")))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_again_and_again_ends_with_the_curve_of_one_that_never_was(world, tmp_path, kills):
    """SIGKILL for two processes under torchrun, at random moments and in the middle of saving; the same command each
    time. Loss and gradient norm of every line are bitwise those of a run on two processes that never stopped."""
    options = ["--data.epochs=60", "--checkpoint.every=2", "--train.eval_every=100000"]
    tiny.train_on_ranks(world, tmp_path / "whole", 2, *options, "--checkpoint.every=100000")
    expected, draw, run_dir = tiny.metrics(tmp_path / "whole"), random.Random(kills), tmp_path / "run"
    command = tiny.torchrun_command(world, run_dir, 2, *options)
    stood = [run_until_killed(command, run_dir, draw, saving=number % 2 == 0) for number in range(kills)]
    assert all(step < len(expected) for step, _ in stood), stood
    assert sorted({step for step, _ in stood}) == [step for step, _ in stood]  # each went further than the one before
    assert all(half for _, half in stood[::2]), "a kill that was meant for a save met none"
    tiny.train_on_ranks(world, run_dir, 2, *options)
    assert tiny.curve(tiny.metrics(run_dir)) == tiny.curve(expected)
    assert not list((run_dir / "checkpoints").glob(".*"))


def stop_somewhere(command, run_dir, draw):
    """Starts the job, and a random time after it got one checkpoint further stops it: by SIGKILL for all, by SIGTERM
    for torchrun or by SIGUSR1 for one process. Returns whether that was inside an evaluation."""
    start, log = newest(run_dir), run_dir.with_suffix(".log")
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    with started(log, command) as (process,):
        wait_for(process, lambda: newest(run_dir) > start, log)
        time.sleep(draw.uniform(0, 1))
        if number == signal.SIGKILL:
            kill(process)
        else:
            ranks = [pid for pid in descendants(process.pid) if rank_of(pid) is not None]
            os.kill(process.pid if number == signal.SIGTERM else draw.choice(ranks), number)
            assert process.wait(30) != 0, log.read_text()  # which torchrun gives them
    if number != signal.SIGKILL:
        assert newest(run_dir) == len(tiny.metrics(run_dir)), log.read_text()
    return newest(run_dir) % EVERY == 0 and not jsonl.has_step(run_dir / layout.EVAL, newest(run_dir))


EVERY = 4


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stops", "epochs"), [(3, 6), pytest.param(20, 40, marks=pytest.mark.slow)])
def test_a_job_that_is_stopped_inside_steps_and_evaluations_ends_as_one_that_never_was(world, tmp_path, stops, epochs):
    """Two processes under torchrun that evaluate most of the time. A signal loses no step; steps, held-out numbers and
    samples are those of a run on two processes that never stopped."""
    every = [f"--checkpoint.every={EVERY}", f"--train.eval_every={EVERY}"]
    options = [f"--data.epochs={epochs}", *every, f"--data.eval_path={world.data}"]
    options += ['--samples.prompts=["1+1"]', "--samples.max_new_tokens=15"]
    tiny.train_on_ranks(world, tmp_path / "whole", 2, *options)
    draw, run_dir = random.Random(stops), tmp_path / "run"
    command = tiny.torchrun_command(world, run_dir, 2, *options)
    are_inside = [stop_somewhere(command, run_dir, draw) for _ in range(stops)]
    assert any(are_inside), "no stop was inside an evaluation"
    assert newest(run_dir) < len(tiny.metrics(tmp_path / "whole"))
    tiny.train_on_ranks(world, run_dir, 2, *options)
    assert tiny.curve(tiny.metrics(run_dir)) == tiny.curve(tiny.metrics(tmp_path / "whole"))
    for name in (layout.EVAL, layout.SAMPLES):
        assert tiny.metrics(run_dir, name) == tiny.metrics(tmp_path / "whole", name)


def rank_of(pid):
    settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(value[5:]) for value in settings if value.startswith(b"RANK=")), None)


def test_one_process_that_cannot_write_costs_all_a_checkpoint_and_none_the_run(world, tmp_path):
    """The second process's files may not grow for a while, the first one's may: they agree, go on, and save again."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    options = ["--data.epochs=40", "--checkpoint.every=20", "--train.eval_every=100000"]
    with started(log, tiny.torchrun_command(world, run_dir, 2, *options)) as (process,):
        wait_for(process, lambda: newest(run_dir), log)
        (second,) = (pid for pid in descendants(process.pid) if rank_of(pid) == 1)
        resource.prlimit(second, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        wait_for(process, lambda: "could NOT be saved: process 1: OSError: [Errno 27]" in log.read_text(), log)
        resource.prlimit(second, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert process.wait(120) == 0, log.read_text()
    steps = [line["step"] for line in tiny.metrics(run_dir)]
    assert steps == list(range(1, 361)) and newest(run_dir) == 360
    assert all(verify_checkpoint(folder, ALONE) for folder in layout.checkpoint_folders(run_dir))
    assert not list((run_dir / "checkpoints").glob(".*"))


def wait_for(process, condition, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_two_processes_then_one_then_four_go_on_as_if_nothing_had_changed(world, alone, tmp_path):
    """The same order of the data, the same schedule, and losses within 1e-6 of the run that stayed on one process."""
    options, previous = ["--data.epochs=2", "--checkpoint.keep=0"], None
    for processes, every, replicate in ((2, 5, 1), (1, 10, 1), (4, 1000, 2)):
        run_dir = tmp_path / str(processes)
        more = [f"--run.resume={previous}"] if previous else []
        more += [f"--checkpoint.every={every}", f"--parallel.replicate={replicate}"]
        if processes == 1:
            tiny.train(world, run_dir, *options, *more)
        else:
            tiny.train_on_ranks(world, run_dir, processes, *options, *more)
        lines = tiny.metrics(run_dir)
        for ours, theirs in zip(lines, alone[-len(lines) :], strict=True):
            assert ours["step"] == theirs["step"] and ours["lr"] == theirs["lr"]
            assert ours["tokens"] == theirs["tokens"] and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        previous = run_dir / "checkpoints" / f"step_{every}"
    assert len(lines) == len(alone) - 10
    manifest = verify_checkpoint(layout.checkpoint_folders(run_dir)[-1], ALONE)
    assert manifest.processes == 4 and len(manifest.shards) == 2  # one of the two replicas wrote
