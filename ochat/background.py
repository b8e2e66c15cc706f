"""Run one function in a thread that does not keep a process which ends: a save's, a plan's, a dump's.

saving = background.start(lambda: write(path), "save step 5");  saving.done();  saving.result()
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


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
