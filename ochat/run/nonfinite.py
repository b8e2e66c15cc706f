"""Count steps with a NaN or infinite loss or gradient, record their conversations, and end a run with too many.

    guard = NonFiniteGuard(config.train.max_nonfinite_steps, writer, ...);  guard.add(7, loss, grad_norm)

Such a step changes no weight: optim.update skips it on the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ochat.errors import NonFiniteError
from ochat.files.jsonl import JsonlWriter

Bins = list[list[str]]  # of each bin, "file:line" of its conversations
log = logging.getLogger(__name__)


@dataclass
class NonFiniteGuard:
    """The non-finite steps of one run, restarts included; every rank counts the same, the first one writes."""

    budget: int
    file: JsonlWriter | None  # None on ranks other than the first
    _: KW_ONLY
    bins_of: Callable[[int], Bins]  # what a step was computed on
    newest: Callable[[], Path | None]  # the checkpoint from which a restart resumes
    in_backward: bool = False  # weights are updated before the whole step is known
    count: int = 0  # a checkpoint keeps it

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Count one more. Raises: NonFiniteError where the budget does not allow it."""
        self.count += 1
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        newest = self.newest() if self.count > self.budget else None
        if self.file is not None:
            bins = self.bins_of(step)
            self.file.append([{"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "bins": bins}])
            what += f"; computed on {_shown(bins)} (all in {self.file.path})"
        if self.count > self.budget:
            raise NonFiniteError(f"{what}. {self._advice(newest)}")
        log.warning("%s. Skipped, non-finite step %d of at most %d", what, self.count, self.budget)

    def _advice(self, newest: Path | None) -> str:
        remedy = (
            "Look at these conversations or lower optim.lr, then start the same command again: it resumes from "
            f"{newest or 'the base, for there is no checkpoint'}"
        )
        if self.in_backward:
            return (
                "With optim.in_backward some weights were updated before it was seen, so what is in memory is lost. "
                f"{remedy}. Without it such steps can be skipped"
            )
        return (
            f"The step was not applied; it is non-finite step {self.count} and train.max_nonfinite_steps is "
            f"{self.budget}. {remedy}. "
            f"Or skip such steps with --train.max_nonfinite_steps={max(10, 2 * self.budget)}"
        )


def _shown(bins: Bins) -> str:
    shown = [f"bin {b}: {', '.join(places[:4])}{' ...' * (len(places) > 4)}" for b, places in enumerate(bins[:8])]
    return "; ".join(shown) + " ..." * (len(bins) > 8)
