"""The plans of a run's epochs: two are kept, and the next is made in a thread while the current one is used.

plans = Plans(make)      # make(epoch) -> PackPlan
plans.start(1); plans(0).num_steps
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from ochat.packing.multipack import PackPlan

KEPT = 2  # the current epoch's and the next one's: memory stays flat over any number of epochs


class Plans:
    """`plans(epoch)` is that epoch's plan, made once while it is kept; safe to use from several threads."""

    def __init__(self, make: Callable[[int], PackPlan]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._kept: dict[int, Future[PackPlan]] = {}  # the one used last stands last

    def __call__(self, epoch: int) -> PackPlan:
        """The plan; waits for a thread that is at it. Raises what making it raised."""
        future, is_new = self._claim(epoch)
        if is_new:
            self._run(epoch, future)
        return future.result()

    def start(self, epoch: int) -> None:
        """Have the plan made in a thread, unless it is there or under way."""
        future, is_new = self._claim(epoch)
        if is_new:
            threading.Thread(target=self._run, args=(epoch, future), daemon=True, name=f"plan of epoch {epoch}").start()

    def _claim(self, epoch: int) -> tuple[Future[PackPlan], bool]:
        """The epoch's place, and whether the caller is the one to fill it."""
        with self._lock:
            is_new = epoch not in self._kept
            future = self._kept.pop(epoch, None) or Future()
            self._kept[epoch] = future
            for oldest in list(self._kept)[:-KEPT]:
                del self._kept[oldest]
            return future, is_new

    def _run(self, epoch: int, future: Future[PackPlan]) -> None:
        try:
            future.set_result(self._make(epoch))
        except BaseException as error:  # whoever asks for the plan raises it
            future.set_exception(error)
