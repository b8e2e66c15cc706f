"""End a run before its time: after the current step at a signal, or at once where a process is gone or hangs.

    with Watchdog(ranks, timeout_s=600) as watchdog:
        watchdog.set_dump_dir(run_dir);  watchdog.enter("step 12");  ...;  watchdog.heartbeat()
        watchdog.enter("saving step 12", timed=False)

Every second a thread of each rank writes its state to the store and reads the state of the next rank, so the cost of
watching all ranks does not grow with their number. A rank that is silent, that left with an error, or that makes no
progress raises an alarm. Every rank reads the alarm, prints it and exits with code 3: a thread cannot interrupt a main
thread that waits in a collective. RUN/flight_recorder/ keeps each rank's collectives and stack as JSON.

    with StopSignal(ranks.world) as stop: ...;  if stop.requested_anywhere(): save;  stop.stop(steps_done)

Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) may reach ranks at different times, so they agree on the step: each
step starts an asynchronous all-reduce over the hosts' network, whose result is read after the next step. A second
Ctrl-C ends the process at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d  # the recorders have no public name

from ochat import background
from ochat.console import complain
from ochat.distributed.processes import Ranks
from ochat.errors import Interrupted, RanksError
from ochat.files import atomic

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FOLDER = "flight_recorder"
# torch's: the newest collectives of the hosts and, in builds with NCCL, of the GPUs
RECORDERS = {"host": "_dump_fr_trace_json", "card": "_dump_nccl_trace_json"}
BEAT_S = 1.0
SILENT_S = 15.0  # after so long a process counts as gone; torchrun gives the others 30 s
DUMP_S = 10.0  # after so long a process exits even if its flight recorder file is not written
GRACE_S = 3.0  # an error that occurs on all ranks is reported by each rank itself


class Watchdog:
    """Watches the main thread of this rank and the next rank; does nothing for a single process.

    Time is counted in beats of the watching thread: a job that the scheduler suspends and resumes survives.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = ranks.rank, ranks.world, timeout_s
        self.silent_s = min(SILENT_S, timeout_s)
        self.detection_s = self.silent_s + GRACE_S + 3 * BEAT_S  # after so long it is known which process is gone
        self.file: Path | None = None  # set once this run owns its folder
        self._store: Any = ranks.store and ranks.store.clone()  # a second connection: the main thread's may block
        self._next, self._place = (ranks.rank + 1) % ranks.world, {"host": socket.gethostname(), "pid": os.getpid()}
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._phase, self._is_timed, self._idle_s = "the start", False, 0.0
        self._last_state, self._silence_s, self._beats, self._exit_reason = "", 0.0, 0, ""
        self._store_error = ""  # why the store can no longer be reached
        self._is_terminated, self._terminated_s = False, 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_dump_dir(self, run_dir: Path) -> None:
        """Write flight recorder files into this run folder from now on."""
        self.file = run_dir / FOLDER / f"rank_{self.rank}.json"

    def enter(self, phase: str, *, timed: bool = True) -> None:
        """The main thread enters a phase, for example "step 12". In a timed one it must call heartbeat() within every
        `timeout_s`; others, such as disk I/O, may take any time."""
        self._phase, self._is_timed = phase, timed
        self.heartbeat()

    def heartbeat(self) -> None:
        """The main thread makes progress."""
        self._idle_s = 0.0

    def __enter__(self) -> Watchdog:
        if self.world > 1:
            signal.signal(signal.SIGTERM, self._receive)
            self._thread.start()
            background.end_with_launcher(0)  # the thread sees it from now on, and says so
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Tells the other ranks how this one ended. A collective's error because a process is gone is left to the
        watching thread, which finds out which one and ends this process."""
        if self.world == 1:
            return
        if isinstance(error, RuntimeError):
            self._thread.join(self.detection_s)
        self._stopped.set()
        self._thread.join(self.detection_s)
        if self._thread.is_alive():  # it waits for the store, and so would this thread
            self._store_error = self._store_error or "the run's store does not answer"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._exit_reason = "done" if error is None else f"{type(error).__name__}: {error}"[:1000]
        if not self._store_error:
            with contextlib.suppress(RuntimeError):
                self._write_state()
        if self._store_error and isinstance(error, RuntimeError):
            raise RanksError(f"{self._phase}: the processes cannot reach each other; {self._store_error}") from error

    def _receive(self, *_: object) -> None:
        """SIGTERM outside of StopSignal: torchrun sends it to all when one has died. The thread finds out which."""
        self._is_terminated = True

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT_S):
            self._idle_s += BEAT_S
            self._terminated_s += BEAT_S * self._is_terminated
            if self._launcher is not None and os.getppid() != self._launcher:  # it would run on unseen, on its GPU
                self._launcher = None
                self._request_stop("the torchrun that started this process is gone")
            problem = "" if self._store_error else self._poll()
            # a neighbour that is silent may be gone, which says more than a time-out: wait until that is known
            is_silent = not self._store_error and 0 < self._silence_s < self.silent_s
            if not problem and self._is_timed and self._idle_s > self.timeout_s and not is_silent:
                problem = self._describe_hang()
            if problem:
                self._abort(problem)
            if self._terminated_s > self.detection_s:
                os._exit(128 + signal.SIGTERM)

    def _poll(self) -> str:
        """Exchanges states through the store; a problem, or ""."""
        try:
            self._write_state()
            return self._store.get("alarm").decode() if self._store.check(["alarm"]) else self._check_next_rank()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self._store_error = f"the run's store is gone, which the torchrun of the first machine keeps ({reason})"
            self._request_stop(self._store_error)
            return ""

    def _check_next_rank(self) -> str:
        found = self._read_state(self._next)
        self._silence_s = 0.0 if found != self._last_state else self._silence_s + BEAT_S
        self._last_state = found
        state = json.loads(found) if found else {"exit": "", "phase": "the start"}
        if state["exit"] and state["exit"] != "done" and self._silence_s >= GRACE_S:
            return f"{self._name(self._next, state)} ended in {state['phase']} with {state['exit']}"
        if not state["exit"] and self._silence_s >= self.silent_s:
            silent = f"has not been heard of for {self._silence_s:.0f} s, last in {state['phase']}"
            return f"{self._name(self._next, state)} {silent}: it was killed or halted, or its machine is lost"
        return ""

    def _write_state(self) -> None:
        self._beats += 1
        state = {"beat": self._beats, "exit": self._exit_reason, "phase": self._phase} | self._place
        self._store.set(f"state/{self.rank}", json.dumps(state))

    def _read_state(self, rank: int) -> str:
        key = f"state/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _describe_hang(self) -> str:
        """Which ranks are in which phase."""
        phases: dict[str, list[str]] = {}
        with contextlib.suppress(RuntimeError):  # without the store only this rank's phase is known
            for rank in range(self.world) if not self._store_error else ():
                state = json.loads(self._read_state(rank) or "{}")
                phases.setdefault(state.get("phase", "the start"), []).append(self._name(rank, state))
        where = "; ".join(f"in {phase}: {_some(names)}" for phase, names in phases.items()) or self._store_error
        return f"no progress for {self._idle_s:.0f} s (parallel.timeout_s = {self.timeout_s:g}): {where}"

    def _abort(self, problem: str) -> None:
        """Raises the alarm, dumps the flight recorder, and exits at once: the files of a run are valid at any time."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None and not self._store_error:
                self._store.set("alarm", problem)
        faulthandler.dump_traceback_later(DUMP_S + 3 * GRACE_S, exit=True, file=2)  # a driver may block all threads
        try:
            found = background.start(lambda: self._dump(problem), "dump").result(DUMP_S)
        except Exception:  # the disk itself may hang
            found = f"; {self.file} is not written after {DUMP_S:g} s"
        remedy = "Start the same command again: it continues from the newest checkpoint"
        complain(RanksError(f"{problem}. Rank {self.rank} was in {self._phase}{found}. {remedy}"))
        sys.stdout.flush()
        time.sleep(2 * BEAT_S)  # the others dump their collectives before our exit changes them
        os._exit(RanksError.exit_code)

    def _dump(self, problem: str) -> str:
        """Writes the flight recorder file; says what this rank waits in and the file's name, or why there is none."""
        if self.file is None:
            return ""
        collectives = {
            name: json.loads(getattr(c10d, dump)()) for name, dump in RECORDERS.items() if hasattr(c10d, dump)
        }
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        record = {"problem": problem, "rank": self.rank, "phase": self._phase} | self._place
        record |= {"stack": traceback.format_stack(main), "collectives": collectives}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_json(self.file, record)
        except OSError as error:
            return f"; {self.file} cannot be written: {error.strerror}"
        entries = [entry for recorder in collectives.values() for entry in recorder.get("entries", [])]
        waiting = [e for e in entries if not e.get("retired", True)]
        names = [f"waiting in {e['profiling_name']} number {e['collective_seq_id']}" for e in waiting[-1:]]
        return f", {''.join(names) or 'in no collective'}; collectives and stack in {self.file}"

    def _request_stop(self, reason: str) -> None:
        """Asks the main thread to save and stop, as a signal from outside would."""
        log.error("rank %d, in %s: %s", self.rank, self._phase, reason)
        os.kill(os.getpid(), signal.SIGTERM)

    def _name(self, rank: int, state: dict[str, Any]) -> str:
        return f"rank {rank} ({state.get('host', 'never heard of')}, pid {state.get('pid', '-')})"


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class StopSignal:
    """Catches the signals inside its `with` block."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.received: int | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested_anywhere(self) -> bool:
        """Whether any rank had received a signal at the previous call: the same answer on every rank."""
        if self.world == 1:
            return self.received is not None
        answer = self._wait()
        flag = torch.tensor([int(self.received is not None)])
        self._pending = flag, dist.all_reduce(flag, async_op=True)
        return answer

    def stop(self, steps_done: int) -> NoReturn:
        """Raises Interrupted; the state after `steps_done` steps must have been saved."""
        self._wait()
        raise Interrupted(steps_done, self.received or signal.SIGTERM)

    def _wait(self) -> bool:
        """The result of the pending all-reduce; False if there is none."""
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        return bool(flag.item())

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        log.info("stopping after this step or the next, then saving; a second Ctrl-C ends at once without saving")
