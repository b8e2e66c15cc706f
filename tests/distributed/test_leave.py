"""How one of several processes exits: pytest tests/distributed/test_leave.py"""

import os
import subprocess
import sys

import pytest

from tests.tiny import ROOT, environment

SCRIPT = """
import atexit, os, sys
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
train_command.configuration = SimpleNamespace(load=lambda *_: None)
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
