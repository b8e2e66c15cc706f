"""The start and the end of a process: the allocator, signals, and how one of several exits."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from ochat.distributed import processes
from ochat.distributed.watchdog import SIGNALS, StopSignal
from ochat.errors import Interrupted
from tests.tiny import ROOT, environment


@pytest.mark.parametrize("given", [None, *processes.ALLOCATOR])
def test_segments_grow_unless_the_environment_says_otherwise(monkeypatch, given):
    at_first_use = {}
    for name in processes.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, "max_split_size_mb:64")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: at_first_use.update(os.environ))
    try:
        assert processes.select_device("cuda") == torch.device("cuda", 0)
    finally:
        os.environ.pop(processes.ALLOCATOR[0], None)
    seen = {name: at_first_use[name] for name in processes.ALLOCATOR if name in at_first_use}
    assert seen == ({given: "max_split_size_mb:64"} if given else {processes.ALLOCATOR[0]: "expandable_segments:True"})


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_for_a_stop_and_a_second_ctrl_c_ends_at_once(number):
    before = signal.getsignal(number)
    with StopSignal(world=1) as stop:
        assert not stop.requested_anywhere()
        os.kill(os.getpid(), number)
        assert stop.requested_anywhere()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="saved at step 3") as stopped:
            stop.stop(3)
    assert stopped.value.exit_code == 128 + number and signal.getsignal(number) == before


SCRIPT = """
import atexit, os, sys
from ochat.config import Config, TrainConfig
from ochat.errors import ConfigError
from types import SimpleNamespace
from ochat import cli
from ochat.commands import train as train_command
from ochat.train import trainer

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken down\\n")

def train(config):
    sys.kept = Kept()
    print("trained")  # not flushed: the output is a pipe
    if len(sys.argv) > 1:
        raise {"fail": ConfigError("wrong"), "disk": OSError(13, "wrong", "/some/where")}[sys.argv[1]]

atexit.register(lambda: print("goodbye"))
train_command.configuration = SimpleNamespace(load=lambda *_: Config(train=TrainConfig(device="cpu")))
trainer.train = train
cli.call("train", ["run.toml"])
"""


def run(world: int, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    environ["WORLD_SIZE"] = str(world)
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("world", "arguments", "exit_code"), [(1, (), 0), (2, (), 0), (2, ("fail",), 1), (2, ("disk",), 1)]
)
def test_one_of_several_flushes_its_output_and_skips_interpreter_shutdown(world, arguments, exit_code):
    done, last = run(world, *arguments), ["taken down"] * (world == 1)
    assert (done.returncode, done.stdout.split("\n")) == (exit_code, ["trained", "goodbye", *last, ""])
    assert ("wrong" in done.stderr) == bool(exit_code) and "Traceback" not in done.stderr


def test_a_closed_output_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = run(2, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
