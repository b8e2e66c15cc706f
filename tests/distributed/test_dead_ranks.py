"""Processes that die under torchrun: the others exit soon, say which and where, and a restart loses nothing."""

import os
import re
import signal
import time

import pytest

from tests import tiny
from tests.checkpoint.test_checkpoint_faults import curve, newest, tell, wait_for
from tests.distributed.faulty_job import LONG, QUICK, exit_codes, has_steps, start, words, workers

pytestmark = pytest.mark.usefixtures("alone")  # it fills Numba's cache, which a short time-out has no room for


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
    assert curve(tiny.metrics(run_dir)) == curve(tiny.metrics(whole))


def test_processes_whose_torchrun_was_killed_save_and_stop(world, tmp_path):
    run_dir = tmp_path / "run"
    with start(world, run_dir, 2) as (process, log):
        wait_for(process, has_steps(run_dir, 3), log)
        orphans = workers(process).values()
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        try:
            while any(os.path.exists(f"/proc/{pid}") for pid in orphans):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        finally:
            tell(orphans, signal.SIGKILL)
    assert re.search(r"rank \d, in step \d+: the (torchrun that started this process|run's store) is gone", words(log))
    assert "start the same command again" in words(log)
    assert newest(run_dir) == len(tiny.metrics(run_dir))
