"""Metrics of a step: summed on the device, read every few steps, written as lines of metrics.jsonl.

`StepMetrics` sums one step on this rank. `MetricsLog` holds finished steps until `flush`, which reads them from the
device in one copy and writes one JSON line a step, with null for a number that is not finite. Accuracy and class losses
are means weighted by |w|, whatever [loss] makes of w; `loss` is what is minimised, and `effective_weight` of a class,
where [loss] changes weights, the sum of its changed |w'| over that of |w|.

MFU = model FLOPs of the step (ModelConfig.flops_per_step) / its seconds / peak FLOP/s of all devices (peak_flops).
"""

from __future__ import annotations

import logging
import math
import resource
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from ochat_kernels import LossOutput
from torch import Tensor

from ochat.data.batch import PackedBatch
from ochat.files import atomic, jsonl
from ochat.files.jsonl import JsonlWriter
from ochat.plan import gpus
from ochat.run import layout
from ochat.run.nonfinite import NonFiniteGuard

log = logging.getLogger(__name__)
_COUNTS = ("tokens", "supervised_tokens", "padded_tokens", "square_lengths")
_SUMS = ("loss", "weight", "correct", *_COUNTS)
_RATES = ("tokens", "supervised_tokens", "padded_tokens")
_CLASS_SUMS = ("loss", "weight", "correct", "tokens", "effective")


class StepMetrics:
    """Sums of one step (or one evaluation) on this rank, on the device in float64."""

    def __init__(self, class_names: Sequence[str], device: torch.device):
        self.class_names = class_names
        self.device = device
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.class_sums = torch.zeros(len(class_names), len(_CLASS_SUMS), dtype=torch.float64, device=device)

    def add(self, batch: PackedBatch, out: LossOutput, step_weight: Tensor | None = None) -> None:
        """Add one micro-batch, on the device, and the LossOutput of its rows, nll, correct and effective (R,), whose
        weights were divided by `step_weight`; does not wait for the device."""
        weights = batch.supervised_weights.double()
        sizes, nll, correct = weights.abs(), out.nll.double(), out.correct.double()
        if out.effective is None:
            loss, effective = (nll * weights).sum(), sizes
        else:
            assert step_weight is not None
            loss = out.loss_sum.detach().double() * step_weight
            effective = out.effective.double().abs() * step_weight
        per_row = torch.stack((nll * sizes, sizes, correct * sizes, sizes.sign(), effective), 1)
        self.class_sums.index_add_(0, batch.supervised_classes, per_row)
        on_device = torch.stack((loss, *per_row[:, 1:3].sum(0)))
        on_host = (batch.num_tokens, batch.num_supervised, batch.input_ids.shape[0], batch.sum_len_sq)
        counts = torch.tensor(on_host, dtype=torch.float64).to(self.device, non_blocking=True)
        self.sums += torch.cat((on_device, counts))

    def to_tensor(self) -> Tensor:
        """All sums in one vector, for one all-reduce."""
        return torch.cat((self.sums, self.class_sums.flatten()))


def summarise(sums: list[float], class_names: Sequence[str], *, has_dynamic: bool = False) -> dict[str, Any]:
    """Loss, accuracy and token counts from the reduced sums of StepMetrics, and the same per class; where the run
    `has_dynamic` weights, also the mean of what each class's weights became."""
    total = dict(zip(_SUMS, sums, strict=False))  # class sums follow
    rows = [sums[i : i + len(_CLASS_SUMS)] for i in range(len(_SUMS), len(sums), len(_CLASS_SUMS))]
    classes = {
        name: {"loss": _ratio(loss, weight), "accuracy": _ratio(correct, weight), "tokens": int(tokens)}
        | ({"effective_weight": _ratio(effective, weight)} if has_dynamic else {})
        for name, (loss, weight, correct, tokens, effective) in zip(class_names, rows, strict=True)
    }
    means: dict[str, Any] = {
        "loss": _ratio(total["loss"], total["weight"]) or 0.0,
        "accuracy": _ratio(total["correct"], total["weight"]) or 0.0,
    }
    return means | {name: int(total[name]) for name in _COUNTS} | {"classes": classes}


@dataclass
class MetricsLog:
    """Finished steps on their way to metrics.jsonl; every rank flushes."""

    file: JsonlWriter
    class_names: Sequence[str]
    _: KW_ONLY
    flops: Callable[[int, int, int], float]  # (tokens, sum of squared lengths, supervised tokens): of a step
    peak_flops: float  # of all ranks
    device: torch.device
    nonfinite: NonFiniteGuard
    has_dynamic: bool = False  # whether [loss] changes weights in some step

    def __post_init__(self) -> None:
        self._pending: list[tuple[int, int, float, Tensor]] = []  # step, epoch, rate, reduced sums and gradient norm
        self._since = time.perf_counter()

    def add(self, step: int, epoch: int, lr: float, sums: Tensor, grad_norm: Tensor) -> None:
        """Add a finished step; its reduced sums and the norm stay on the device."""
        values = torch.cat((sums, grad_norm.detach().double().reshape(1).to(sums.device)))
        self._pending.append((step, epoch, lr, values))

    def flush(self) -> list[dict[str, Any]]:
        """Read the pending steps from the device, write their lines and return them; times are means over these steps.

        A step whose loss or gradient norm is not finite was not applied: its line says `"skipped": true`. Raises:
        NonFiniteError for the first such step beyond train.max_nonfinite_steps, after writing those before it.
        """
        if not self._pending:
            return []
        rows = torch.stack([values for *_, values in self._pending]).tolist()
        seconds = (time.perf_counter() - self._since) / len(rows)
        pending, self._pending, self._since = self._pending, [], time.perf_counter()
        lines: list[dict[str, Any]] = []
        try:
            for (step, epoch, lr, _), row in zip(pending, rows, strict=True):
                line = self._line(step, epoch, lr, row, seconds)
                if not (math.isfinite(row[0]) and math.isfinite(row[-1])):  # as optim.update decides
                    self.nonfinite.add(step, line["loss"], line["grad_norm"])
                    # JSON has no NaN and no infinity: msgspec writes null
                    line = msgspec.json.decode(msgspec.json.encode(line)) | {"skipped": True}
                lines.append(line)
        finally:
            self.file.append(lines)
        return lines

    def restart_clock(self) -> None:
        """Exclude the time since the last flush (an evaluation, a checkpoint) from the next steps' times."""
        self._since = time.perf_counter()

    def _line(self, step: int, epoch: int, lr: float, row: list[float], seconds: float) -> dict[str, Any]:
        means = summarise(row[:-1], self.class_names, has_dynamic=self.has_dynamic)
        work = self.flops(*(means[name] for name in ("tokens", "square_lengths", "supervised_tokens")))
        line = {"step": step, "epoch": epoch, "loss": means["loss"], "accuracy": means["accuracy"], "lr": lr}
        line |= {"grad_norm": row[-1]} | {f"{name}_per_s": means[name] / seconds for name in _RATES}
        line |= {"mfu": work / seconds / self.peak_flops, "peak_mem_gib": peak_memory_gib(self.device)}
        return line | {"step_s": seconds} | {name: means[name] for name in ("tokens", "supervised_tokens", "classes")}


def truncate_after(path: Path, last_step: int) -> None:
    """Drop the lines after `last_step`, which a killed run wrote past its checkpoint, atomically.

    Lines that are none of a run (a damaged disk leaves zeros) are warned of: those behind a line of `last_step` are
    dropped too, those before are kept aside in a file of their own.
    """
    if not path.exists():
        return
    # split bytes, not text: U+2028 in an answer ends a line of text, and a damaged line may not be UTF-8
    lines = path.read_bytes().split(b"\n")
    torn = lines.pop()
    kept, aside, behind, newest = [], [], [], -math.inf
    for number, line in enumerate(lines, start=1):
        if (values := jsonl.parse_line(line)) is None:
            (aside if newest < last_step else behind).append((number, line))
        else:
            newest = max(newest, values["step"])
            if values["step"] <= last_step:
                kept.append(line)
    damaged = layout.damaged(path)
    if aside:
        with damaged.open("ab") as file:
            file.writelines(line + b"\n" for _, line in aside)
        log.warning("%s: %s; kept in %s, as the run does not need it", path, _numbered(aside), damaged.name)
    if behind:
        log.warning(
            "%s: %s; dropped, as it is behind step %d, from which the run goes on", path, _numbered(behind), last_step
        )
    if torn or len(kept) != len(lines):
        atomic.write_bytes(path, b"".join(line + b"\n" for line in kept))


def warn_of_lost_steps(path: Path, last_step: int) -> None:
    """Warn where metrics.jsonl has no line of a step up to `last_step`; it may begin late, after another run's
    checkpoint."""
    if not path.exists():
        return
    found = {line["step"] for line in jsonl.read_lines(path)}
    if lost := [step for step in range(int(min(found, default=1)), last_step + 1) if step not in found]:
        what = f"step {lost[0]:,}" + (f" and {len(lost) - 1:,} others up to step {lost[-1]:,}" if len(lost) > 1 else "")
        log.warning("%s: no line of %s; the numbers are lost, the training of these steps is not", path, what)


def peak_flops(device: torch.device, configured_tflops: float, dtype: torch.dtype) -> tuple[float, str]:
    """(peak FLOP/s of one device, its source): configured, the GPU's data sheet, or a measured matrix product."""
    if configured_tflops:
        return configured_tflops * 1e12, "configured"
    if device.type == "cuda":
        card = gpus.lookup(torch.cuda.get_device_name(device))
        if card is not None:
            return card.peak_tflops * 1e12, f"data sheet of {card.name.split('-')[0]}, dense bf16"
    return _measured_flops(device, dtype), "a matrix product timed at start"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated by torch on CUDA, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _numbered(lines: list[tuple[int, bytes]]) -> str:
    others = f", as {'are' if len(lines) > 2 else 'is'} {len(lines) - 1} more" if len(lines) > 1 else ""
    return f"line {lines[0][0]} is damaged{others}"


def _measured_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = timeit.repeat(lambda: (left @ right).sum().item(), number=1, repeat=4)
    return 2 * size**3 / min(seconds)


def _ratio(value: float, weight: float) -> float | None:
    return value / weight if weight else None
