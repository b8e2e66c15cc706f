"""What ends a run in which processes wait for one that is gone, or for each other.

    with Watchdog(ranks, timeout_s=600) as watchdog:
        watchdog.keep_in(run_dir);  watchdog.at("step 12");  ...;  watchdog.progress();  ...;  watchdog.rest("a save")

A thread of each rank writes every second into the store where its rank is, and reads where the next rank is: so all are
watched, at a cost that does not grow with their number. One that is silent, that has left with an error, or that makes
no progress is named in an alarm, which every rank reads, prints and ends with (exit code 3): a thread cannot reach a
main thread that waits in a collective. RUN/flight_recorder/ keeps each rank's collectives and stack as JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d as c10d  # the recorders have no public name

from ochat.distributed.processes import Ranks
from ochat.errors import RanksError, complain
from ochat.files import atomic

FOLDER = "flight_recorder"
BEAT_S = 1.0
SILENT_S = 15.0  # then a process is gone: torchrun leaves the others 30 s
KEEP_S = 10.0  # then a process ends although its flight recorder's file is not written
GRACE_S = 3.0  # an error that all ranks meet is reported by each in its own words


class Watchdog:
    """Watches over the main thread of this rank and over the next rank; nothing to do where there is one process.

    Time is counted in beats of its own thread, so that a job which the scheduler halts and wakes does not fall apart.
    """

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.rank, self.world, self.timeout_s = ranks.rank, ranks.world, timeout_s
        self.silent_s = min(SILENT_S, timeout_s)
        self.file: Path | None = None  # before a folder is this run's, it may be another one's
        self._store: Any = ranks.store and ranks.store.clone()  # a connection of its own: the main thread's may wait
        self._next = (ranks.rank + 1) % ranks.world
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._place, self._is_limited, self._idle_s = "the start", False, 0.0
        self._heard, self._silence_s, self._beats, self._left = "", 0.0, 0, ""
        self._lost = ""  # why the store can no longer be reached
        self._is_told, self._told_s = False, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def keep_in(self, run_dir: Path) -> None:
        """The run's folder, from now on the place of the flight recorder's files."""
        self.file = run_dir / FOLDER / f"rank_{self.rank}.json"

    def at(self, place: str) -> None:
        """The main thread is at `place`, where it must make progress every `timeout_s`."""
        self._place, self._is_limited = place, True
        self.progress()

    def rest(self, place: str) -> None:
        """The main thread is at `place`, where it waits as long as a disk needs."""
        self._place, self._is_limited = place, False

    def progress(self) -> None:
        """The main thread moves."""
        self._idle_s = 0.0

    def __enter__(self) -> Watchdog:
        if self.world > 1:
            signal.signal(signal.SIGTERM, self._receive)
            self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Leaves with a word for the others. What a collective raises where a process has gone is left to the thread,
        which finds out who it was and ends this process."""
        if self.world == 1:
            return
        if isinstance(error, RuntimeError):
            self._thread.join(self._verdict_s)
        self._over.set()
        self._thread.join(self._verdict_s)
        if self._thread.is_alive():  # it waits for the store, and so would this thread
            self._lost = self._lost or "the run's store does not answer"
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._left = "done" if error is None else f"{type(error).__name__}: {error}"[:1000]
        if not self._lost:
            with contextlib.suppress(RuntimeError):
                self._say()
        if self._lost and isinstance(error, RuntimeError):
            raise RanksError(f"{self._place}: the processes cannot reach each other; {self._lost}") from error

    @property
    def _verdict_s(self) -> float:
        """In so long it is known who is gone."""
        return self.silent_s + GRACE_S + 3 * BEAT_S

    def _receive(self, *_: object) -> None:
        """SIGTERM while no Interrupt listens: torchrun sends it to all where one has died. The thread finds out who."""
        self._is_told = True

    def _watch(self) -> None:
        while not self._over.wait(BEAT_S):
            self._idle_s += BEAT_S
            self._told_s += BEAT_S * self._is_told
            self._check_launcher()
            problem = "" if self._lost else self._look()
            if not problem and self._is_limited and self._idle_s > self.timeout_s:
                problem = self._hang()
            if problem:
                self._end(problem)
            if self._told_s > self._verdict_s:
                os._exit(128 + signal.SIGTERM)

    def _look(self) -> str:
        """Says where this rank is and hears where the next one is; what is wrong, or nothing."""
        try:
            return self._listen()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self._lost = f"the run's store is gone, which the torchrun of the first machine keeps ({reason})"
            self._stop(self._lost)
            return ""

    def _listen(self) -> str:
        self._say()
        if self._store.check(["alarm"]):
            return self._store.get("alarm").decode()
        heard = self._read(self._next)
        self._silence_s = 0.0 if heard != self._heard else self._silence_s + BEAT_S
        self._heard = heard
        state = json.loads(heard) if heard else {"left": "", "place": "the start"}
        if state["left"] and state["left"] != "done" and self._silence_s >= GRACE_S:
            return f"{self._name(self._next, state)} ended in {state['place']} with {state['left']}"
        if not state["left"] and self._silence_s >= self.silent_s:
            return (
                f"{self._name(self._next, state)} has not been heard of for {self._silence_s:.0f} s, last in "
                f"{state['place']}: it was killed or halted, or its machine is lost"
            )
        return ""

    def _say(self) -> None:
        self._beats += 1
        state = {"beat": self._beats, "place": self._place, "left": self._left}
        state |= {"host": socket.gethostname(), "pid": os.getpid()}
        self._store.set(f"state/{self.rank}", json.dumps(state))

    def _read(self, rank: int) -> str:
        key = f"state/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _hang(self) -> str:
        """Who is where, when nothing has moved for too long."""
        places: dict[str, list[str]] = {}
        with contextlib.suppress(RuntimeError):  # without the store it is known of this rank alone
            for rank in range(self.world) if not self._lost else ():
                state = json.loads(self._read(rank) or "{}")
                places.setdefault(state.get("place", "the start"), []).append(self._name(rank, state))
        where = "; ".join(f"in {place}: {_some(names)}" for place, names in places.items()) or self._lost
        return f"no progress for {self._idle_s:.0f} s (parallel.timeout_s = {self.timeout_s:g}): {where}"

    def _end(self, problem: str) -> None:
        """Tells all, keeps what the collectives were at, and ends the process as it is: what a run has on the disk
        is whole at any moment."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None and not self._lost:
                self._store.set("alarm", problem)
        faulthandler.dump_traceback_later(KEEP_S + 3 * GRACE_S, exit=True, file=2)  # a driver may halt all threads
        kept: list[str] = []
        keeper = threading.Thread(target=lambda: kept.append(self._kept(problem)), daemon=True)
        keeper.start()
        keeper.join(KEEP_S)  # the disk may be what hangs
        found = kept[0] if kept else f"; {self.file} is not written after {KEEP_S:g} s"
        complain(
            RanksError(
                f"{problem}. Rank {self.rank} was in {self._place}{found}. Start the same command again: it goes on "
                "from the newest checkpoint"
            )
        )
        sys.stdout.flush()
        time.sleep(2 * BEAT_S)  # the others write down what they wait in, before our end changes it
        os._exit(RanksError.exit_code)

    def _kept(self, problem: str) -> str:
        """What this rank waits in, and where that is written."""
        if self.file is None:
            return ""
        try:
            return f"{self._keep(problem, self.file)}; collectives and stack in {self.file}"
        except OSError as error:
            return f"; {self.file} cannot be written: {error.strerror}"

    def _keep(self, problem: str, file: Path) -> str:
        """Writes the flight recorder's file; the collective that this rank waits in. Raises: OSError."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        record = {"problem": problem, "rank": self.rank, "place": self._place, "stack": traceback.format_stack(main)}
        record |= {"host": socket.gethostname(), "pid": os.getpid(), "collectives": recorded()}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(file, record)
        entries = [entry for recorder in record["collectives"].values() for entry in recorder.get("entries", [])]
        waiting = [entry for entry in entries if not entry.get("retired", True)]
        if not waiting:
            return ", in no collective"
        return f", waiting in {waiting[-1]['profiling_name']} number {waiting[-1]['collective_seq_id']}"

    def _check_launcher(self) -> None:
        """A process whose torchrun was killed would run on unseen and keep its card: it saves and stops."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            self._stop("the torchrun that started this process is gone")

    def _stop(self, reason: str) -> None:
        """Asks the main thread to save and stop, as a signal from outside would."""
        print(f"rank {self.rank}, in {self._place}: {reason}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    def _name(self, rank: int, state: dict[str, Any]) -> str:
        return f"rank {rank} ({state.get('host', 'never heard of')}, pid {state.get('pid', '-')})"


def recorded() -> dict[str, Any]:
    """What torch's flight recorders hold: the newest collectives of the host's network, and of the cards."""
    dumps = {"host": "_dump_fr_trace_json", "card": "_dump_nccl_trace_json"}  # the second is in builds with NCCL
    return {name: json.loads(getattr(c10d, dump)()) for name, dump in dumps.items() if hasattr(c10d, dump)}


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
