"""Stop a run after the current step on Ctrl-C, SIGTERM, or SIGUSR1 (a scheduler's warning).

Ranks may receive a signal at different times, so they agree on the step: each step starts an asynchronous all-reduce
over the hosts' network, whose result is read after the next step. A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ochat.errors import OchatError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(OchatError):
    """A signal stopped the run, and its state is saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, steps_done: int, number: int):
        super().__init__(f"stopped after step {steps_done} by a signal; start the same command again to continue")
        self.exit_code = 128 + number


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

    def stop(self, steps_done: int) -> None:
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
