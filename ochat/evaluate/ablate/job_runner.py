"""Run jobs as processes, several at a time, each with a log of its own.

    failed = run_jobs(jobs, slots=[{"OMP_NUM_THREADS": "1"}] * 2)

A slot holds the environment variables that give one job its own resources. On Linux the processes end with this one,
even when it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Callable, Mapping, Sequence
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
    try:
        return asyncio.run(_run_all(jobs, slots))
    except asyncio.CancelledError:  # by SIGTERM
        raise KeyboardInterrupt from None


async def _run_all(jobs: Sequence[Job], slots: Sequence[Mapping[str, str]]) -> list[Job]:
    free, left, failed = asyncio.Queue[Mapping[str, str]](), list(jobs), []
    for slot in slots:
        free.put_nowait(slot)

    async def run(job: Job) -> None:
        slot, started = await free.get(), time.monotonic()
        has_failed = False
        for program in job.programs:
            has_failed = has_failed or await _call(program, job.log, slot) != 0
        if has_failed:
            failed.append(job)
        else:
            job.finish()
        left.remove(job)
        free.put_nowait(slot)
        what = "failed" if has_failed else "done"
        log.info("%s %s after %.0f s, %d to go", job.name, what, time.monotonic() - started, len(left))

    main, shown = asyncio.current_task(), 0
    assert main is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, main.cancel)
    tasks = [asyncio.create_task(run(job)) for job in jobs]
    try:
        with bar("steps", sum(job.steps for job in jobs)) as advance:
            while pending := [task for task in tasks if not task.done()]:
                done, _ = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises what finish() raised
                steps = sum(job.steps_done() for job in jobs)
                advance(steps - shown)
                shown = steps
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return failed


async def _call(program: Sequence[str], output: Path, slot: Mapping[str, str]) -> int:
    """The program's exit status. Cancelled, it asks the program to end, and waits for it."""
    tied = ["-c", TIED, *program] if sys.platform == "linux" else program
    with output.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *tied, stdin=DEVNULL, stdout=file, stderr=file, env=os.environ | dict(slot)
        )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


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
