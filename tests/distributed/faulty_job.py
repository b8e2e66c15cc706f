"""A long run under torchrun with an optional fault of rank 1; the tests that use it end it, or fail.

with start(world, run_dir, 2, in_step="time.sleep(1e6)") as (process, log): ...
"""

import contextlib
import re
import subprocess

from tests import tiny
from tests.checkpoint.test_checkpoint_faults import descendants, kill, rank_of

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
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tiny.ROOT, env=tiny.environment(), stdout=output, stderr=output)
    try:
        yield process, log
    finally:
        kill(process)


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
