"""Run one function in a thread that does not keep a process which ends: a save's, a plan's, a dump's. And end this
process with the one that started it.

saving = background.start(lambda: write(path), "save step 5");  saving.done();  saving.result()
end_with_launcher(signal.SIGTERM)
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def start(work: Callable[[], T], name: str) -> Future[T]:
    """The result of `work`, or what it raised, once a daemon thread of this name has it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def end_with_launcher(number: int) -> None:
    """Have Linux send this signal here when the process that started this one is gone; 0: no longer."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
