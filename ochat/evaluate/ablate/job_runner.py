"""Run jobs as processes, several at a time, each with a log of its own.

    failed = run_jobs(jobs, slots=[{"OMP_NUM_THREADS": "1"}] * 2)

A slot holds the environment variables that give one job its own resources. On Linux the processes end with this one,
even when it is killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ochat.console import bar

log = logging.getLogger(__name__)
POLL_S = 0.2
TAIL_LINES = 15
# asks the kernel to kill the process when its parent ends, then becomes the program
TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclass(frozen=True)
class Job:
    """Python programs that run one after the other."""

    name: str
    programs: Sequence[Sequence[str]]  # the interpreter's arguments
    log: Path
    steps: int
    steps_done: Callable[[], int]
    finish: Callable[[], object]  # called after the last program


def run_jobs(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> list[Job]:
    """Run all jobs, one per slot at a time. Returns the failed ones, whose logs say why; a failure stops no other job.

    Ctrl-C and SIGTERM are passed on to the processes, which save and end; this waits for them. A second one does not.
    """
    waiting, free, failed = list(jobs), list(slots), []
    running: list[_Running] = []
    with bar("steps", sum(job.steps for job in jobs)) as advance, _sigterm_as_ctrl_c():
        shown = 0
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_Running(waiting.pop(0), free.pop(0)))
                time.sleep(POLL_S)
                for each in [each for each in running if each.has_ended()]:
                    running.remove(each)
                    free.append(each.slot)
                    failed += [each.job] * each.has_failed
                    what = "failed" if each.has_failed else "done"
                    seconds, left = time.monotonic() - each.started, len(waiting) + len(running)
                    log.info("%s %s after %.0f s, %d to go", each.job.name, what, seconds, left)
                idle = {job.name for job in waiting}
                under_way = {each.job.name: each.job.steps_done() for each in running}
                steps = sum(under_way.get(job.name, job.steps) for job in jobs if job.name not in idle)
                advance(steps - shown)
                shown = steps
        except BaseException:
            for each in running:
                each.process.terminate()
            for each in running:
                each.process.wait()
            raise
    return failed


def slots(num_jobs: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables of `num_jobs` jobs at a time: CUDA devices in turns, and equal shares of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_jobs))
    own = {"OMP_NUM_THREADS": threads}
    return [own | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}) for i in range(num_jobs)]


def cuda_devices() -> list[str]:
    """The CUDA devices that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])


class _Running:
    """A job that occupies a slot."""

    def __init__(self, job: Job, slot: Mapping[str, str]) -> None:
        self.job, self.slot, self.started = job, slot, time.monotonic()
        self._programs = iter(job.programs)
        self.process = self._start(next(self._programs))

    @property
    def has_failed(self) -> bool:
        """Whether the last program ended with an error."""
        return bool(self.process.returncode)

    def has_ended(self) -> bool:
        """Start the next program where one has ended without an error; whether there is none left."""
        if self.process.poll() is None:
            return False
        following = None if self.has_failed else next(self._programs, None)
        if following is not None:
            self.process = self._start(following)
            return False
        if not self.has_failed:
            self.job.finish()
        return True

    def _start(self, program: Sequence[str]) -> subprocess.Popen:
        tied = ["-c", TIED, *program] if sys.platform == "linux" else program
        with self.job.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *tied], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=os.environ | dict(self.slot),
            )  # fmt: skip


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Without it SIGTERM would end this process at once, and kill its jobs unsaved."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
