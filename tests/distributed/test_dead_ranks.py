"""Processes that die or hang under torchrun: the others exit soon, say which and where, with each rank's flight
recorder, and a restart loses nothing."""

import contextlib
import json
import os
import re
import signal
import time

import pytest

from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, newest, rank_of, started, tell, wait_for

pytestmark = pytest.mark.usefixtures("alone")  # it fills Numba's cache, which a short time-out has no room for
LONG = ["--data.epochs=2000", "--train.eval_every=100000", "--checkpoint.every=100000"]
QUICK = ["--parallel.timeout_s=5"]

# ochat.train with a fault: {in_step} at the start of step 5, {in_save} when files of a checkpoint are written
FAULTY = """
import os, sys, time
from ochat import cli, errors
from ochat.files.safetensors_file import PinnedSafetensors
from ochat.train.trainer import Trainer

plain_step, plain_write = Trainer.step, PinnedSafetensors.write

def step(self, step, batches):
    if step == 4 and self.ranks.rank == 1:
        {in_step}
    plain_step(self, step, batches)

def write(self, path):
    if os.environ["RANK"] == "1":
        {in_save}
    return plain_write(self, path)

Trainer.step, PinnedSafetensors.write = step, write
cli.run("train", sys.argv[1:])
"""


@contextlib.contextmanager
def start(world, run_dir, processes, *more, launcher=(), in_step="pass", in_save="pass"):
    """(process, its log); the job is killed at the end in any case."""
    program, log = run_dir.with_suffix(".py"), run_dir.with_suffix(".log")
    program.write_text(FAULTY.format(in_step=in_step, in_save=in_save))
    command = tiny.torchrun_command(world, run_dir, processes, *LONG, *more)
    words = command.index("-m", command.index("torch.distributed.run"))
    command[words : words + 2] = [*launcher, str(program)]
    with started(log, command) as (process,):
        yield process, log


def workers(process):
    """rank -> pid of the processes that train."""
    return {rank: pid for pid in descendants(process.pid) if (rank := rank_of(pid)) is not None}


def has_steps(run_dir, count):
    """A function that says whether so many steps are in the metrics."""
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def words(log):
    """The log on one line."""
    return " ".join(log.read_text().split())


def exit_codes(log):
    """rank -> exit code, from torchrun's summary."""
    found = re.findall(r"rank +: (\d+) .*?exitcode +: (-?\d+)", log.read_text(), re.DOTALL)
    return {int(rank): int(code) for rank, code in found}


def test_a_killed_process_ends_the_others_within_30_s_by_name_and_step(world, tmp_path):
    """With the default time-outs. SIGTERM, which torchrun sends to the others at once, does not make them save."""
    run_dir = tmp_path / "run"
    with start(world, run_dir, 3, "--data.bins_per_step=6") as (process, log):
        wait_for(process, has_steps(run_dir, 5), log)
        time.sleep(1.5)  # a process reports its phase every second
        ranks = workers(process)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(60) != 0
        assert time.monotonic() - killed < 30
    where = rf"rank 1 \(\S+, pid {ranks[1]}\) has not been heard of for 15 s, last in step (\d+)"
    (alarm, *again) = re.findall(where, words(log))
    assert again == [alarm]  # both others print it; the step is that of the last second
    for rank in (0, 2):
        (step,) = re.findall(rf"Rank {rank} was in step (\d+)", words(log))
        assert int(step) > 5 and int(alarm) <= int(step)
    assert exit_codes(log) == {0: 3, 1: -signal.SIGKILL, 2: 3}
    assert not list((run_dir / "checkpoints").glob("*"))


def test_a_process_that_dies_while_it_saves_is_noticed_before_the_time_out_of_disks(world, tmp_path):
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2, "--checkpoint.every=6", *QUICK, in_save="time.sleep(1e6)") as (process, log):
        wait_for(process, has_steps(run_dir, 8), log)  # the save hangs, steps continue up to the next save
        os.kill(workers(process)[1], signal.SIGKILL)
        assert process.wait(30) != 0
    assert re.search(r"rank 1 \(\S+, pid \d+\) has not been heard of for 5 s, last in \w+ ", words(log))
    assert exit_codes(log)[0] == 3 and newest(run_dir) == 0


def test_a_process_that_hangs_and_then_dies_is_reported_as_gone(world, tmp_path):
    """Whoever waited for it reaches the time-out first, and says what is known a moment later."""
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2, *QUICK, in_step="time.sleep(1e6)") as (process, log):
        wait_for(process, has_steps(run_dir, 4), log)
        time.sleep(3)
        os.kill(workers(process)[1], signal.SIGKILL)
        assert process.wait(30) != 0
    assert re.search(r"rank 1 \(\S+, pid \d+\) has not been heard of for 5 s, last in step 4", words(log))


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ({"in_step": "raise errors.DataError('conversation 7 is torn')"}, "rank 1: DataError: conversation 7 is torn"),
        ({"in_save": "None + 1"}, "TypeError: unsupported operand"),
    ],
)
def test_an_error_of_one_process_ends_all_and_only_that_one_explains_it(world, tmp_path, fault, shown):
    """A bug while saving is not reported as a full disk, and prints its traceback."""
    with start(world, tmp_path / "run", 2, "--checkpoint.every=6", *QUICK, **fault) as (process, log):
        assert process.wait(60) != 0
    text = words(log)
    assert shown in text and ("in write" in text) == ("in_save" in fault)
    name = shown.removeprefix("rank 1: ").split(":")[0]
    assert re.search(rf"RanksError: rank 1 \(\S+, pid \d+\) ended in [\w ]+ \d+ with {name}: ", text)
    assert exit_codes(log)[0] == 3 and "could NOT be saved" not in text


def test_torchrun_restarts_a_run_that_lost_a_process_and_the_curve_is_the_same(world, tmp_path):
    options = ["--data.epochs=6", "--checkpoint.every=10", *QUICK]
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    tiny.train_on_ranks(world, whole, 2, *LONG, *options, "--checkpoint.every=1000")
    with start(world, run_dir, 2, *options, launcher=["--max-restarts=1"]) as (process, log):
        wait_for(process, lambda: newest(run_dir) >= 10, log)
        os.kill(workers(process)[1], signal.SIGKILL)
        assert process.wait(120) == 0, log.read_text()
    assert "resuming from" in words(log) and "has not been heard of" in words(log)
    assert tiny.curve(tiny.metrics(run_dir)) == tiny.curve(tiny.metrics(whole))


def assert_gone(orphans, seconds, log):
    """All of these processes end within so many seconds; none is left behind in any case."""
    deadline = time.monotonic() + seconds
    try:
        while any(os.path.exists(f"/proc/{pid}") for pid in orphans):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    finally:
        tell(orphans, signal.SIGKILL)


def test_processes_whose_torchrun_was_killed_save_and_stop(world, tmp_path):
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2) as (process, log):
        wait_for(process, has_steps(run_dir, 3), log)
        orphans = workers(process).values()
        os.kill(process.pid, signal.SIGKILL)
        assert_gone(orphans, 30, log)
    assert re.search(r"rank \d, in step \d+: the (torchrun that started this process|run's store) is gone", words(log))
    assert "start the same command again" in words(log)
    assert newest(run_dir) == len(tiny.metrics(run_dir))


def test_processes_whose_torchrun_is_killed_before_they_meet_end_with_it(world, tmp_path):
    """While they import torch: nobody would answer them for minutes."""
    log = tmp_path / "log"
    with started(log, tiny.torchrun_command(world, tmp_path / "run", 2)) as (process,):

        def is_importing(pid):
            with contextlib.suppress(OSError):
                return "/numpy/" in open(f"/proc/{pid}/maps").read()

        wait_for(process, lambda: len(found := workers(process)) == 2 and all(map(is_importing, found.values())), log)
        orphans = workers(process).values()
        os.kill(process.pid, signal.SIGKILL)
        assert_gone(orphans, 10, log)


HANGS = "time.sleep(1e6)"
DISK_HANGS = "import ochat.distributed.watchdog as w; w.DUMP_S = 1; w.atomic.write_json = lambda *_: time.sleep(1e6)"


@pytest.mark.parametrize("disk_hangs", [False, True])
def test_a_hung_process_ends_the_run_by_a_time_out_with_the_flight_recorder_kept(world, tmp_path, disk_hangs):
    """Rank 1 never enters step 5 and the others wait in a collective. Its disk may hang too."""
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2, *QUICK, in_step=f"{DISK_HANGS}; {HANGS}" if disk_hangs else HANGS) as (process, log):
        assert process.wait(60) != 0
    text = words(log)
    who = r"no progress for \d s \(parallel.timeout_s = 5\): .*in step 5: rank 0 \(.*in step 4: rank 1 \("
    assert re.search(who, text) or re.search(r"in step 4: rank 1 \(.*in step 5: rank 0 \(", text)
    assert re.search(
        r"Rank 0 was in step 5, waiting in gloo:\w+ number \d+; collectives and stack in \S+rank_0.json", text
    )
    assert set(exit_codes(log).values()) == {3}
    record = json.loads((run_dir / "flight_recorder" / "rank_0.json").read_text())
    entries = record["collectives"]["host"]["entries"]
    assert not all(entry["retired"] for entry in entries) and entries[-1]["profiling_name"]
    assert "all_reduce" in "".join(record["stack"])
    if disk_hangs:
        assert re.search(r"Rank 1 was in step 4; \S+rank_1.json is not written after 1 s", text)
    else:
        assert "Rank 1 was in step 4, in no collective" in text
        assert HANGS in "".join(json.loads((run_dir / "flight_recorder" / "rank_1.json").read_text())["stack"])


def test_a_halted_process_is_named_by_the_others(world, tmp_path):
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2, *QUICK) as (process, log):
        wait_for(process, has_steps(run_dir, 3), log)
        halted = workers(process)[1]
        os.kill(halted, signal.SIGSTOP)
        wait_for(process, lambda: "Rank 0 was in step" in words(log), log, seconds=15)
        tell([halted], signal.SIGKILL)  # torchrun would wait 30 s for it
        assert process.wait(60) != 0
    assert f"pid {halted}) has not been heard of for 5 s" in words(log)
    assert (run_dir / "flight_recorder" / "rank_0.json").is_file()
