"""Several machines: the scripts of configs/launch are started, here and on two hosts with a network between them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ochat.checkpoint.manifest import verify_checkpoint
from ochat.run import layout
from tests import tiny
from tests.checkpoint.test_checkpoint_faults import ALONE, kill, newest, started, wait_for

LAUNCH = tiny.ROOT / "configs" / "launch"
OPTIONS = ["--data.epochs=2", "--checkpoint.every=5"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NODE = {"PATH": PATH, "GPUS": "2", "RESTARTS": "0"}  # torchrun on the path, two processes


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def assert_same_run(run_dir, alone):
    """The curve of the run on one process, and a last checkpoint that loads."""
    for ours, theirs in zip(tiny.metrics(run_dir), alone, strict=True):
        assert ours["step"] == theirs["step"] and ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert verify_checkpoint(layout.checkpoint_folders(run_dir)[-1], ALONE).step == len(alone)


@pytest.mark.parametrize(("script", "count"), [("single_node.sh", 1), ("multi_node.sh", 2)])
def test_the_recipes_give_the_curve_of_one_process(world, alone, tmp_path, script, count):
    """One torchrun, or two that meet; the model is sharded over all two or four processes."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [LAUNCH / script, *tiny.options(world, run_dir, *OPTIONS)]
    more = {"HEAD": "localhost", "NODES": "2", "PORT": free_port()} if count > 1 else {}
    with started(log, *[command] * count, **NODE | more) as nodes:
        assert [node.wait(120) for node in nodes] == [0] * count, log.read_text()
    assert f"one copy, sharded over {2 * count} processes, on {count} node" in " ".join(log.read_text().split())
    assert_same_run(run_dir, alone)


@pytest.fixture
def hosts():
    """Commands that put what follows onto one of two hosts, each with its address, its name and nothing else."""
    names = [f"ochat{os.getpid()}{side}" for side in "ab"]
    table = "".join(f"10.77.0.{i} {name}\n" for i, name in enumerate(names, start=1)) + "127.0.0.1 localhost\n"
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True) if os.geteuid() == 0 else None
    if made is None or made.returncode:
        pytest.skip("two hosts on one machine take root and network namespaces")
    steps = [f"netns add {names[1]}", f"-n {names[0]} link add eth0 type veth peer name eth0 netns {names[1]}"]
    for i, name in enumerate(names, start=1):
        steps += [f"-n {name} address add 10.77.0.{i}/24 dev eth0", f"-n {name} link set eth0 up"]
        steps += [f"-n {name} link set lo up"]
        folder = Path("/etc/netns") / name  # mounted over /etc/hosts in this namespace
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(table)
    try:
        for step in steps:
            subprocess.run(["ip", *step.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])
            (Path("/etc/netns") / name / "hosts").unlink()
            (Path("/etc/netns") / name).rmdir()


def on(name, command):
    return ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh", *command]


def test_two_hosts_that_share_only_a_disk_train_one_model(world, alone, tmp_path, hosts):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    command = [LAUNCH / "multi_node.sh", *tiny.options(world, run_dir, *OPTIONS, "--parallel.replicate=2")]
    more = {"HEAD": hosts[0], "NODES": "2", "GLOO_SOCKET_IFNAME": "eth0"}
    with started(log, *(on(name, command) for name in hosts), **NODE | more) as nodes:
        assert [node.wait(120) for node in nodes] == [0, 0], log.read_text()
    assert_same_run(run_dir, alone)


def test_a_host_that_goes_dark_ends_the_other_by_name(world, alone, tmp_path, hosts):
    """The second host's processes and its cable are gone at once; the first knows within the time-out."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    options = ["--data.epochs=2000", "--train.eval_every=100000", "--parallel.timeout_s=5"]
    command = [LAUNCH / "multi_node.sh", *tiny.options(world, run_dir, *options)]
    more = {"HEAD": hosts[0], "NODES": "2", "GLOO_SOCKET_IFNAME": "eth0", "GPUS": "1"}
    with started(log, *(on(name, command) for name in hosts), **NODE | more) as (first, second):
        wait_for(first, (run_dir / "metrics.jsonl").exists, log)
        subprocess.run(["ip", "-n", hosts[1], "link", "set", "eth0", "down"], check=True)
        kill(second)
        assert first.wait(60) != 0
    assert f"rank 1 ({hosts[1]}, pid " in log.read_text() or f"rank 0 ({hosts[1]}, pid " in log.read_text()
    assert "has not been heard of for 5 s" in " ".join(log.read_text().split())


SRUN = """#!/usr/bin/env bash
# two nodes on this machine, and signals passed on, as srun does
nodes=()
for _ in 1 2; do "$@" & nodes+=($!); done
trap 'kill -USR1 "${nodes[@]}"' USR1
status=0
for node in "${nodes[@]}"; do
    while kill -0 "$node" 2>/dev/null; do wait "$node"; code=$?; done
    ((code > status)) && status=$code
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >>"$REQUEUED"; fi
"""


def test_the_slurm_script_saves_before_the_time_is_up_and_goes_on_when_it_is_started_again(world, tmp_path):
    run_dir, log, requeued = tmp_path / "run", tmp_path / "log", tmp_path / "requeued"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = ["--data.epochs=40", "--checkpoint.every=100000", "--train.eval_every=100000"]
    command = [LAUNCH / "slurm.sh", *tiny.options(world, run_dir, *options)]
    more = {"PATH": f"{tmp_path}:{PATH}", "REQUEUED": str(requeued), "GPUS": "1", "RESTARTS": "3"}
    more |= {"SLURM_JOB_ID": free_port(), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    with started(log, command, **NODE | more) as (process,):
        wait_for(process, (run_dir / "metrics.jsonl").exists, log)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) != 0
    assert requeued.read_text() == f"requeue {more['SLURM_JOB_ID']}\n", log.read_text()
    assert 0 < newest(run_dir) == len(tiny.metrics(run_dir)) < 360
    with started(log, command, **NODE | more) as (process,):
        assert process.wait(120) == 0, log.read_text()
    assert [line["step"] for line in tiny.metrics(run_dir)] == list(range(1, 361))
    assert requeued.read_text().count("\n") == 1 and f"resuming from {run_dir}" in " ".join(log.read_text().split())
