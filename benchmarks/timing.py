"""Time calls in turns, measure their memory and error, and measure the device's ceilings in the same run.

    times = interleave({"a": run_a, "b": run_b}, repeats=20, device=device); statistics.median(times["a"])
On a GPU the device sleeps before every measured call, so that the host's launch is not part of the time.
"""

from __future__ import annotations

import gc
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

GIB = 2**30
LEAD_CYCLES = 4_000_000  # the device sleeps 2 ms, in which the host launches what is measured
COMPARED_AT_A_TIME = 2**26
DEVICE_LOST = 3  # exit status


class Ceilings(NamedTuple):
    """What the device reaches at best: a large bf16 matrix product, and a large copy, read + written."""

    tflop_per_s: float
    gb_per_s: float

    def floor_ms(self, flops: int, num_bytes: int) -> float:
        """The least time for this much work, whichever of the two takes longer."""
        return max(flops / (self.tflop_per_s * 1e9), num_bytes / (self.gb_per_s * 1e6))


def interleave(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    around: Mapping[str, Callable[[], AbstractContextManager]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, taken in turns (a b c a b c ...) so that a drift of the device affects all alike.

    `around`: the context in which a call runs; entering it is not part of the time.
    """
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            with (around or {}).get(name, nullcontext)():
                readers[name].append(_timed(call, device))
    synchronize(device)
    return {name: [read() for read in reads] for name, reads in readers.items()}


def _timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Run the call once; return a function that reads its milliseconds, on a GPU after a synchronisation."""
    if device.type != "cuda":
        before = time.perf_counter()
        call()
        elapsed_ms = (time.perf_counter() - before) * 1e3
        return lambda: elapsed_ms
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    call()
    end.record()
    return lambda: start.elapsed_time(end)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(call: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that the call holds beyond what is held before it, outputs included; None on a CPU."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / GIB


def max_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any element over the largest element expected, of the worst of the pairs; NaN if any
    value is NaN. ValueError for pairs of different shapes or numbers."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        raise ValueError(f"got shapes {[tuple(x.shape) for x in got]}: expected {[tuple(x.shape) for x in expected]}")
    errors = [_pair_error(a, b) for a, b in zip(got, expected, strict=True)]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _pair_error(got: Tensor, expected: Tensor) -> float:
    difference, scale = 0.0, 0.0
    for a, b in zip(*(x.reshape(-1).split(COMPARED_AT_A_TIME) for x in (got, expected)), strict=True):
        piece = (a.float() - b.float()).abs().max().item() if a.numel() else 0.0
        if math.isnan(piece):
            return math.nan
        difference = max(difference, piece)
        scale = max(scale, b.float().abs().max().item() if b.numel() else 0.0)
    return difference / scale if scale else difference


def measure_ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Medians of an 8192^3 bf16 matrix product on random data and of a 4 GiB copy (quick: sizes that only run)."""
    side, copied = (64, 2**16) if quick else (8192, 2**31)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.randn(copied, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    interleave(calls, 3 if quick else 20, device)  # the GPU's clock settles
    marks = interleave(calls, 3 if quick else 20, device)
    moved = 2 * source.numel() * source.element_size()
    product_ms, copy_ms = (statistics.median(marks[name]) for name in calls)
    return Ceilings(2 * side**3 / product_ms / 1e9, moved / copy_ms / 1e6)


def sustained_tflops(device: torch.device, *, quick: bool = False) -> float:
    """What the same product reaches when nothing else runs for 3 s: the mean over the last two thirds, in which the
    card is at its limit of power."""
    side, seconds = (64, 0.03) if quick else (8192, 3.0)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    out, start, done, first = torch.empty_like(a), time.perf_counter(), 0, 0.0
    while (elapsed := time.perf_counter() - start) < seconds:
        if not first and elapsed > seconds / 3:
            first, done = elapsed, 0
        for _ in range(20):
            torch.mm(a, b, out=out)
        synchronize(device)  # some 30 ms of work for a wait of 20 us
        done += 20
    return 2 * side**3 * done / (elapsed - first) / 1e12


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after the time: a compiler that never ends must not stop the run."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(problem: Exception) -> str:
    """Why there is no number, in one line."""
    text = str(problem).strip().split("\n")[0]
    return f"{type(problem).__name__}: {text}"[:200]


def check_alive(device: torch.device) -> None:
    """After a failure: free its memory; exit if the device no longer answers."""
    free(device)
    try:
        synchronize(device)
    except RuntimeError as problem:
        print(f"the device does not answer any more: {problem}", file=sys.stderr)
        sys.exit(DEVICE_LOST)


def free(device: torch.device) -> None:
    """Release unreferenced memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
