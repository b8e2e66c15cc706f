"""Work on many items at a time where each waits for a server.

for item, result in in_parallel(ask, items, workers=8): ...      # as they are done, in any order
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)), as each is done. After an error of `work` no item is begun; those under way are still given,
    for they may have cost something, and then the first error is raised.

    The threads are daemons: Ctrl-C ends the process without waiting for a server's reply.
    """
    waiting, lock, stop = iter(items), threading.Lock(), threading.Event()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                try:
                    item = next(waiting)
                except StopIteration:
                    break
            try:
                done.put((item, work(item), None))
            except Exception as error:  # raised again, where the results are taken
                stop.set()
                done.put((item, None, error))
        done.put(None)

    for _ in range(workers):
        threading.Thread(target=run, daemon=True).start()
    try:
        yield from _taken(done, workers)
    finally:
        stop.set()


def _taken(done: queue.SimpleQueue[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    first: Exception | None = None
    while workers:
        result = done.get()
        if result is None:
            workers -= 1
        elif result[2] is not None:
            first = first or result[2]
        else:
            yield result[:2]
    if first is not None:
        raise first
