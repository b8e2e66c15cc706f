"""A signal asks a run to end after the step in hand: Ctrl-C, SIGTERM, or SIGUSR1 (a scheduler's warning).

Each rank raises its flag; the flags travel with the step's sums, so that all ranks see the same answer at the same
step. A second Ctrl-C ends at once.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ochat.errors import OchatError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(OchatError):
    """The run was told to stop and has saved its state; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Interrupt:
    """Catches the signals while it is entered."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def flag(self, device: torch.device) -> Tensor:
        """(1,) float64: 1 once a signal has come, else 0."""
        return torch.full((1,), float(self.received is not None), dtype=torch.float64, device=device)

    def stop(self, steps_done: int) -> None:
        """Raises Interrupted; the state of `steps_done` steps must have been saved."""
        number = self.received or signal.SIGTERM
        raise Interrupted(
            f"stopped after step {steps_done} by a signal; start the same command again to go on", 128 + number
        )

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
