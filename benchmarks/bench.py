"""How a time is taken and written down: interleaved between implementations, beside ceilings measured in the same run.

    marks = interleaved({"a": run_a, "b": run_b}, repeats=20, device=device); percentile(marks["a"], 50)
On a card the host is given a lead over every measured call, so that launching it is not part of the time.
"""

from __future__ import annotations

import csv
import gc
import math
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

GIB = 2**30
LEAD_CYCLES = 4_000_000  # 2 ms of idling on the card, in which the host launches what is measured
COMPARED_AT_A_TIME = 2**26
DEVICE_LOST = 3  # exit status


class Ceilings(NamedTuple):
    """What the device reaches at best: a large bf16 matrix product, and a large copy, read + written."""

    tflop_per_s: float
    gb_per_s: float

    def floor_ms(self, flops: int, num_bytes: int) -> float:
        """The least time for this much work, whichever of the two takes longer."""
        return max(flops / (self.tflop_per_s * 1e9), num_bytes / (self.gb_per_s * 1e6))


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest of the sorted values, as NumPy's default."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every call, taken in turns (a b c a b c ...) so that a drift of the card meets all alike."""
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            readers[name].append(_timed(call, device))
    synchronize(device)
    return {name: [read() for read in reads] for name, reads in readers.items()}


def _timed(call: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """Runs the call once; returns what reads its milliseconds, on a card after a synchronisation."""
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
    """The most memory held during the call above what is held before it, its outputs included; None on a CPU."""
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
    interleaved(calls, 3 if quick else 20, device)  # the card's clock settles
    marks = interleaved(calls, 3 if quick else 20, device)
    moved = 2 * source.numel() * source.element_size()
    product_ms, copy_ms = (percentile(marks[name], 50) for name in calls)
    return Ceilings(2 * side**3 / product_ms / 1e9, moved / copy_ms / 1e6)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread once the time is over: a compiler that never ends must not end the run."""

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
    """Why there is no number, in a line."""
    text = str(problem).strip().split("\n")[0]
    return f"{type(problem).__name__}: {text}"[:200]


def check_alive(device: torch.device) -> None:
    """After a failure: frees what it held; ends the run if the card no longer answers."""
    free(device)
    try:
        synchronize(device)
    except RuntimeError as problem:
        print(f"the device does not answer any more: {problem}", file=sys.stderr)
        sys.exit(DEVICE_LOST)


def free(device: torch.device) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def stamp(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Where and with what a number was measured."""
    on_card = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": torch.cuda.get_device_name(device) if on_card else "cpu-interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_card else "",
    }


def cpu_name() -> str:
    """The processor's own name where Linux tells it, else its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def output_of(*command: str) -> str:
    """The command's first line, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


class Rows:
    """A CSV that grows by a row at a time and is flushed with each, so that a stopped run leaves what it measured."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        has_header = path.exists() and path.stat().st_size > 0
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)
        if not has_header:
            self._writer.writeheader()
            self._file.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Floats are written with 5 digits; a missing value is an empty field."""
        self._writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()
