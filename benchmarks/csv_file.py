"""Measurements as rows of a CSV, with where and by what they were made.

rows = CsvFile(Path("ops.csv"), COLUMNS); rows.add(stamp(device) | {"median_ms": 1.5})
for row in read(Path("ops.csv")): ...
"""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

Row = dict[str, str]


class CsvFile:
    """A CSV that grows row by row. Each row is flushed, so a stopped run keeps what it measured."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        has_header = path.exists() and path.stat().st_size > 0
        if has_header and (found := next(csv.reader(path.open(newline="", encoding="utf-8")))) != list(columns):
            raise SystemExit(f"{path}: has other columns ({', '.join(found)}); name another file")
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)
        if not has_header:
            self._writer.writeheader()
            self._file.flush()

    def add(self, row: dict[str, Any]) -> None:
        """Write a row: floats with 5 digits, an empty field for a missing value."""
        self._writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in row.items()})
        self._file.flush()


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def spread(values: Sequence[float], name: str = "") -> dict[str, float]:
    """Median, 20th and 80th percentile as columns: `name`, `name_p20`, `name_p80`; without a name median, p20, p80."""
    names = (name, f"{name}_p20", f"{name}_p80") if name else ("median", "p20", "p80")
    return dict(zip(names, np.percentile(values, (50, 20, 80)).tolist(), strict=True))


def stamp(device: torch.device, commit: str | None = None) -> dict[str, str]:
    """Where and by what a number was measured."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit or output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu-interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
    }


def stamp_cpu(columns: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """The same for a program that needs no GPU: those of `columns` that it knows."""
    known = stamp(torch.device("cpu"), commit) | {
        "device": "cpu",
        "cpu": cpu_name(),
        "python": platform.python_version(),
    }
    return {name: value for name, value in known.items() if name in columns}


def cpu_name() -> str:
    """The processor's name where Linux gives one, else its architecture."""
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
