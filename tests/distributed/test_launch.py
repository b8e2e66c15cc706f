"""`ochat train --gpus` starts the processes itself: one message an error, signals passed on, documented exit codes."""

import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, newest, rank_of, started, wait_for
from tests.distributed.test_nodes import assert_same_run, free_port

LONG = ["--data.epochs=2000", "--train.eval_every=100000", "--checkpoint.every=100000"]


def command(world, run_dir, *more):
    return [sys.executable, "-m", "ochat", "train", *tiny.options(world, run_dir, *more)]


def workers(process):
    return {rank: pid for pid in descendants(process.pid) if (rank := rank_of(pid)) is not None}


def has_torch(pid):
    """Whether the process is past the interpreter's own start, where Ctrl-C ends it with a traceback."""
    with contextlib.suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


def words(log):
    return " ".join(log.read_text().split())


def test_two_processes_give_the_curve_of_one_and_nothing_on_stderr(world, alone, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    line = command(world, run_dir, "--gpus", "2", "--data.epochs=2", "--checkpoint.every=5")
    with started(log, line) as (process,):
        assert process.wait(120) == 0, log.read_text()
    assert "2 on cpu: one copy, sharded over 2 processes" in words(log)
    assert not re.search(r"torch|[WE]\d{4} |\*\*\*", log.read_text())
    assert_same_run(run_dir, alone)


def test_two_machines_meet_by_rank_in_any_order(world, alone, tmp_path):
    run_dir, log, where = tmp_path / "run", tmp_path / "log", f"localhost:{free_port()}"
    line = command(world, run_dir, "--nodes=2", "--rendezvous", where, "--data.epochs=2", "--checkpoint.every=5")
    with started(log, [*line, "--node-rank=1"], [*line, "--node-rank=0"]) as nodes:
        assert [node.wait(120) for node in nodes] == [0, 0], log.read_text()
    assert not re.search(r"torch|[WE]\d{4} |\*\*\*", log.read_text())
    assert_same_run(run_dir, alone)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_saves_once_and_says_so_in_one_line(world, tmp_path, number, code):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with started(log, command(world, run_dir, "--gpus=2", *LONG)) as (process,):
        wait_for(process, (run_dir / "metrics.jsonl").exists, log)
        process.send_signal(number)
        assert process.wait(60) == code, log.read_text()
    done = len(tiny.metrics(run_dir))
    assert 0 < newest(run_dir) == done
    _, after = log.read_text().split("\nstopping after this step or the next")
    *notes, last = after.splitlines()[1:]
    assert last == f"Interrupted, saved at step {done}; start the same command again to continue"
    assert all(line.startswith(("step ", "saved ")) for line in notes)


def test_ctrl_c_before_the_first_step_is_one_word(world, tmp_path):
    log = tmp_path / "log"
    with started(log, command(world, tmp_path / "run", "--gpus=2", *LONG)) as (process,):
        wait_for(process, lambda: [has_torch(pid) for pid in workers(process).values()] == [True, True], log)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    assert log.read_text().strip() in ("interrupted", "")


def test_a_machine_that_waits_for_another_ends_at_ctrl_c(world, tmp_path):
    log, port = tmp_path / "log", free_port()
    line = command(world, tmp_path / "run", "--nodes=2", "--node-rank=0", f"--rendezvous=localhost:{port}")

    def listens():
        with socket.socket() as client:
            return client.connect_ex(("localhost", int(port))) == 0

    with started(log, line) as (process,):
        wait_for(process, listens, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (-signal.SIGINT, 130)
    assert log.read_text() == f"waiting at localhost:{port} until all 2 machines are there\n"


def test_machines_that_cannot_meet_are_told_what_to_give(world, tmp_path):
    log, taken = tmp_path / "log", socket.create_server(("localhost", 0))
    where = {"nohost.invalid:29400": 1, f"localhost:{taken.getsockname()[1]}": 0}
    for address, rank in where.items():
        line = command(world, tmp_path / "run", "--nodes=2", f"--node-rank={rank}", f"--rendezvous={address}")
        with started(log, line) as (process,):
            assert process.wait(60) == 3
        assert f"RanksError: --rendezvous {address}, --node-rank {rank} of 2: the machines do not meet" in words(log)
    assert log.read_text().count("\n") == 4
    taken.close()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--data.path=nowhere"], 1, "nowhere"),
        (["--data.bins_per_step=1"], 1, "bins_per_step"),
        (["--parallel.replicate=3"], 1, "ConfigError: parallel.shard = 0 x parallel.replicate = 3"),
        (["--optim.lr=-1"], 1, "ConfigError: optim.lr = -1"),
    ],
)
def test_an_error_of_all_processes_is_said_once(world, tmp_path, options, code, said):
    log = tmp_path / "log"
    with started(log, command(world, tmp_path / "run", "--gpus=2", *options)) as (process,):
        assert process.wait(60) == code
    (line,) = log.read_text().splitlines()
    assert said in line


def test_a_killed_process_is_named_in_one_message(world, tmp_path):
    """By the process that is left, or by the launcher where none is."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    with started(log, command(world, run_dir, "--gpus=2", *LONG, "--parallel.timeout_s=5")) as (process,):
        wait_for(process, (run_dir / "metrics.jsonl").exists, log)
        for pid in workers(process).values():
            os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == 3
    assert len(re.findall("Error", log.read_text())) == 1
    assert re.search(
        r"RanksError: rank \d \(pid \d+\) was ended by SIGKILL, .* Start the same command again", words(log)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus=0"], "--gpus 0: at least 1"),
        (["--nodes=2"], "--rendezvous '': --nodes needs HOST:PORT"),
        (["--nodes=2", "--rendezvous=here:29400"], "--node-rank None: --nodes 2 needs the number of this machine"),
        (["--nodes=2", "--rendezvous=here:1", "--node-rank=2"], "from 0 to 1"),
        (["--node-rank=0"], "need --nodes"),
        (["--gpus=2", "--train.device=auto"], "--gpus 2, but torch sees no GPU here; use --train.device=cpu"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_anything_starts(world, tmp_path, options, said):
    log = tmp_path / "log"
    with started(log, command(world, tmp_path / "run", *options), CUDA_VISIBLE_DEVICES="") as (process,):
        assert process.wait(60) in (1, 2)
    assert said in words(log) and log.read_text().count("\n") == 1
