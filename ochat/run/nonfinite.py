"""Steps whose loss or gradient is NaN or infinite. They change nothing (optim.update sees to that, on the device); here
they are counted, written down with the conversations they were computed on, and end the run when there are too many.

    bad = BadSteps(config.train.max_nonfinite_steps, ...);  bad.add({"step": 7, "loss": nan, "grad_norm": nan})
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ochat.errors import NonFiniteError
from ochat.files.jsonl import LineFile

Bins = list[list[str]]  # of each bin, "file:line" of its conversations


class BadSteps:
    """Those of one run, restarts included; every rank counts alike, the first one writes and tells."""

    def __init__(
        self,
        budget: int,
        file: LineFile | None,
        *,
        bins_of: Callable[[int], Bins],
        newest: Callable[[], Path | None],
        warn: Callable[[str], None],
        in_backward: bool = False,
    ) -> None:
        """`file`: None on other ranks than the first. `bins_of(step)`: what a step was computed on. `newest()`: the
        checkpoint that a restart goes on from. `in_backward`: weights are updated before the whole step is known."""
        self.budget, self.file, self.bins_of, self.newest, self.warn = budget, file, bins_of, newest, warn
        self.in_backward = in_backward
        self.count = 0  # so far; a checkpoint keeps it

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """One more. Raises: NonFiniteError where the budget does not allow it."""
        self.count += 1
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        newest = self.newest() if self.count > self.budget else None
        if self.file is not None:
            bins = self.bins_of(step)
            self.file.append([{"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "bins": bins}])
            what += f"; computed on {_shown(bins)} (all in {self.file.path})"
        if self.count > self.budget:
            raise NonFiniteError(f"{what}. {self._advice(newest)}")
        self.warn(f"{what}. Skipped, bad step {self.count} of at most {self.budget}")

    def _advice(self, newest: Path | None) -> str:
        place = newest or "the base, for there is no checkpoint"
        mend = (
            f"Look at these conversations or lower optim.lr, then start the same command again: it goes on from {place}"
        )
        if self.in_backward:
            return (
                "With optim.in_backward some weights were updated before it was seen, so what is in memory is lost. "
                f"{mend}. Without it such steps can be skipped"
            )
        return (
            f"The step was not applied; it is bad step {self.count} and train.max_nonfinite_steps is {self.budget}. "
            f"{mend}. "
            f"Or skip such steps with --train.max_nonfinite_steps={max(10, 2 * self.budget)}"
        )


def _shown(bins: Bins) -> str:
    shown = [f"bin {b}: {', '.join(places[:4])}{' ...' * (len(places) > 4)}" for b, places in enumerate(bins[:8])]
    return "; ".join(shown) + " ..." * (len(bins) > 8)
