"""Processes at work side by side, each with its log: who is at which step, how long it will take, and who failed.

    failed = crew.work(tasks, slots=[{"OMP_NUM_THREADS": "1"}] * 2, console)

A slot is what one process at a time has to itself, as variables of its environment. Processes end with this one,
however it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

POLL_S = 0.2
TAIL_LINES = 15
# asks the system to end the process with its parent, then becomes the program
TIED = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


@dataclass(frozen=True)
class Task:
    """Programs of Python, one after the other, that count up to `steps`."""

    name: str
    programs: Sequence[Sequence[str]]  # the interpreter's arguments
    log: Path
    steps: int
    done: Callable[[], int]  # steps so far
    finish: Callable[[], object]  # called after the last program


@dataclass
class _Worker:
    """A task under way in a slot."""

    task: Task
    environment: Mapping[str, str]
    bar: TaskID
    started: float = field(default_factory=time.monotonic)
    next: int = 0  # of the task's programs
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """The task's next program."""
        program = self.task.programs[self.next]
        tied = ["-c", TIED, *program] if sys.platform == "linux" else program
        with self.task.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *tied], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | dict(self.environment),
            )  # fmt: skip
        self.next += 1


def work(tasks: Sequence[Task], slots: Sequence[Mapping[str, str]], console: Console) -> list[Task]:
    """Does all tasks, as many at a time as there are slots; those that failed, whose logs say why. Others go on.

    Ctrl-C and SIGTERM reach the processes too, which save and end; this waits for them.
    """
    waiting, failed, free = list(tasks), [], list(slots)
    workers: list[_Worker] = []
    with _bars(console) as bars, _terminable():
        whole = bars.add_task("all", total=sum(task.steps for task in tasks))
        try:
            while waiting or workers:
                while waiting and free:
                    task = waiting.pop(0)
                    bar = bars.add_task(task.name, total=task.steps, completed=task.done())
                    workers.append(_Worker(task, free.pop(0), bar))
                    workers[-1].start()
                time.sleep(POLL_S)
                for worker in [w for w in workers if _has_ended(w, failed)]:
                    workers.remove(worker)
                    free.append(worker.environment)
                    bars.remove_task(worker.bar)
                    left = len(waiting) + len(workers)
                    _say(bars.console, worker, worker.task in failed, left)
                _show(bars, whole, workers, tasks, waiting)
        except BaseException:
            _stop(workers)
            raise
    return failed


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text("utf-8", "replace").splitlines()[-lines:])


def _has_ended(worker: _Worker, failed: list[Task]) -> bool:
    """Whether the task is over; a failed one is noted, one with another program goes on with it."""
    assert worker.process is not None
    status = worker.process.poll()
    if status is None:
        return False
    if status:
        failed.append(worker.task)
        return True
    if worker.next < len(worker.task.programs):
        worker.start()
        return False
    worker.task.finish()
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is Ctrl-C: else this process would end at once, and its processes with it, unsaved."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(workers: Sequence[_Worker]) -> None:
    """Asks all to save and end, and waits for them, however long a step and a checkpoint take; a second Ctrl-C does
    not wait."""
    processes = [worker.process for worker in workers if worker.process is not None]
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


def _bars(console: Console) -> Progress:
    left = (TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *left)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(
    bars: Progress, whole: TaskID, workers: Sequence[_Worker], tasks: Sequence[Task], waiting: Sequence[Task]
) -> None:
    """Moves the bars; those that neither wait nor work have made their steps."""
    steps = {worker.task.name: worker.task.done() for worker in workers}
    for worker in workers:
        bars.update(worker.bar, completed=steps[worker.task.name])
    gone = {task.name for task in waiting}
    made = (steps.get(task.name, task.steps) for task in tasks if task.name not in gone)
    bars.update(whole, completed=sum(made))


def _say(console: Console, worker: _Worker, has_failed: bool, left: int) -> None:
    seconds = time.monotonic() - worker.started
    what = "[bold red]failed[/]" if has_failed else "done"
    console.print(f"{escape(worker.task.name)} {what} after {seconds:.0f} s, {left} to go", highlight=False)
