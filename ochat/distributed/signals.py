"""A signal asks a run to end after the step in hand: Ctrl-C, SIGTERM, or SIGUSR1 (a scheduler's warning).

Ranks may hear of it at different times, so they ask each other: what is asked after one step is answered after the
next, over the host's network, while the device works. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ochat.errors import OchatError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(OchatError):
    """The run was told to stop and has saved its state; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupt:
    """Catches the signals while it is entered."""

    def __init__(self, world: int, say: Callable[[str], None]) -> None:
        self.world, self.say = world, say
        self.received: int | None = None
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether a rank was told to stop, as of the last call but one: the same answer on every rank."""
        if self.world == 1:
            return self.received is not None
        answer = self._answer()
        flag = torch.tensor([int(self.received is not None)])
        self._asked = flag, dist.all_reduce(flag, async_op=True)
        return answer

    def stop(self, steps_done: int) -> None:
        """Raises Interrupted; the state of `steps_done` steps must have been saved."""
        self._answer()
        number = self.received or signal.SIGTERM
        message = f"stopped after step {steps_done} by a signal; start the same command again to go on"
        raise Interrupted(message, 128 + number)

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        flag, work = self._asked
        work.wait()
        return bool(flag.item())

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        self.say("stopping after this step or the next, then saving; a second Ctrl-C ends at once, unsaved")
