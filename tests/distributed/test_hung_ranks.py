"""Processes that hang under torchrun: the run exits with who is where, and each rank's flight recorder."""

import json
import os
import re
import signal

import pytest

from tests.checkpoint.test_checkpoint_faults import tell, wait_for
from tests.distributed.faulty_job import QUICK, exit_codes, has_steps, start, words, workers

pytestmark = pytest.mark.usefixtures("alone")  # it fills Numba's cache, which a short time-out has no room for
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
