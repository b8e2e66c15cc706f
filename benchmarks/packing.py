"""Measure packing: number of steps, balance of work, mixing, speed; ours and the public method. No GPU, one core.

    python -m benchmarks.packing [--lengths LENGTHS.json] [--quick] [--out benchmarks/results/packing.csv]
Every row is planned once with the FLOPs of Llama-3-8B and once with those of Llama-3.2-1B; steps, mixing and time are
of the 8B plan. Mixing is the variance over steps of a mean (of lengths; of the share of one class), over that of as
many sequences drawn at random: 1 is random, 0 is every step alike. The last step, often partial, is left out of
balance and mixing. Seconds are CPU time. `--lengths`: your own, as a JSON list.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import csv_file
from benchmarks.packing_public import pack_public
from ochat.model.config import ModelConfig
from ochat.packing.multipack import plan

MODELS = {
    "8b": ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "1b": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64),
}
SHAPES = ((1, 32768), (8, 32768), (64, 32768), (512, 32768), (1024, 32768), (4096, 32768), (8, 40960))
SHORT_BINS = ((8, 8192), (8, 16384))  # where bins hold few of the longest, or one
COLUMNS = [
    *("set", "sequences", "bins", "budget", "packer", "steps", "floor", "used_pct", "fill_pct", "cost_8b_mean"),
    *("cost_8b_worst", "cost_1b_mean", "cost_1b_worst", "sq_mean", "sq_worst", "mixing_length", "mixing_class"),
    *("seconds", "us_per_sequence", "steps_1b", "wall_seconds", "peak_rss_gib", "warm_up_s"),
    *("cpu", "python", "commit", "date"),
]
PIPE_COLUMNS = 220  # width of a table that does not go to a terminal
SHOWN = {  # column of the CSV -> heading of the printed table
    "set": "set", "bins": "bins", "budget": "budget", "packer": "packer", "steps": "steps", "floor": "floor",
    "used_pct": "used %", "fill_pct": "fill %", "cost_8b_mean": "8B mean", "cost_8b_worst": "worst",
    "cost_1b_mean": "1B mean", "cost_1b_worst": "worst", "sq_mean": "len² mean", "sq_worst": "worst",
    "mixing_length": "mixing len", "mixing_class": "class", "us_per_sequence": "us/seq",
}  # fmt: skip


def chat_lengths(count: int, longest: int = 8192) -> NDArray[np.int32]:
    """Log-normal, median 403 tokens, drawn in pieces to save memory."""
    lengths, rng = np.empty(count, np.int32), np.random.default_rng(1)
    for begin in range(0, count, 1 << 20):
        piece = lengths[begin : begin + (1 << 20)]
        piece[:] = np.clip(rng.lognormal(6, 1, len(piece)), 8, longest)
    return lengths


def model_costs(lengths: NDArray, model: str) -> NDArray[np.float32]:
    """Model FLOPs of every sequence, of which 0.3 to 0.9 is supervised."""
    flops, rng = MODELS[model].flops_per_step, np.random.default_rng(2)
    token, square, supervised = (flops(*unit) for unit in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    costs = np.empty(len(lengths), np.float32)
    for begin in range(0, len(lengths), 1 << 20):
        piece = lengths[begin : begin + (1 << 20)].astype(np.float64)
        costs[begin : begin + (1 << 20)] = piece * (
            token + square * piece + supervised * rng.uniform(0.3, 0.9, len(piece))
        )
    return costs


def sets(path: Path | None, count: int) -> dict[str, NDArray]:
    rng = np.random.default_rng(0)
    found = {
        "chat to 8192": chat_lengths(count),
        "uniform to 2048": rng.integers(1, 2049, count),
        "uniform to 8192": rng.integers(1, 8193, count),
    }
    if path is not None:
        own = np.array(json.loads(path.read_text(encoding="utf-8")))
        found = {path.stem: own, f"{path.stem}, drawn": rng.choice(own, count)} | found
    return found


def cases(found: dict[str, NDArray]) -> Iterator[tuple[str, NDArray, int, int]]:
    for name, lengths in found.items():
        shapes = ((1, 8192), (8, 8192), (64, 8192)) if name == "uniform to 8192" else SHAPES + SHORT_BINS
        for bins, budget in shapes:
            yield name, lengths, bins, budget


def imbalance(values: NDArray, offsets: NDArray, bins: int) -> tuple[float, float]:
    """Mean and worst over the steps but the last of the largest over mean sum in a step's bins."""
    sums = np.diff(np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])[offsets]).reshape(-1, bins)[:-1]
    ratios = sums.max(axis=1) / sums.mean(axis=1)
    return (float(ratios.mean()), float(ratios.max())) if len(ratios) else (math.nan, math.nan)


def mixing(values: NDArray, everyone: NDArray, offsets: NDArray, bins: int) -> float:
    """Variance over steps (but the last) of the mean value, over the mean of var / k for their k sequences."""
    ends = offsets[::bins]
    counts = np.diff(ends)[:-1]
    if len(counts) < 10:
        return math.nan  # too few to speak of a variance
    means = np.diff(np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])[ends])[:-1] / counts
    return float(means.var() / (everyone.var() * (1 / counts).mean()))


def facts(
    lengths: NDArray, costs: dict[str, NDArray], indices: NDArray, offsets: NDArray, bins: int, budget: int
) -> dict:
    num_steps, total = (len(offsets) - 1) // bins, int(lengths.sum())
    classes = np.random.default_rng(3).random(len(lengths)) < np.clip(lengths / 2000, 0.1, 0.9)  # experts write more
    used = int(lengths[indices].sum())
    square = imbalance(lengths[indices].astype(float) ** 2, offsets, bins)
    return {
        "steps": num_steps,
        "floor": -(-total // (bins * budget)),
        "used_pct": 100 * used / total,
        "fill_pct": 100 * used / (num_steps * bins * budget) if num_steps else math.nan,
        **{
            f"cost_{m}_{k}": v
            for m, c in costs.items()
            for k, v in zip(("mean", "worst"), imbalance(c[indices], offsets, bins), strict=True)
        },
        "sq_mean": square[0],
        "sq_worst": square[1],
        "mixing_length": mixing(lengths[indices], lengths, offsets, bins),
        "mixing_class": mixing(classes[indices], classes, offsets, bins),
    }


def measure(lengths: NDArray, bins: int, budget: int, packer: str, costs: dict[str, NDArray]) -> dict:
    begin = time.process_time()
    if packer != "ours":
        indices, offsets, _ = pack_public(lengths, bins, budget, 0, packer.removeprefix("public "))
        seconds = time.process_time() - begin
        return facts(lengths, costs, indices, offsets, bins, budget) | speed(seconds, len(lengths))
    settings = {"token_budget": budget, "bins_per_step": bins, "seed": 0, "epoch": 0}
    packed = plan(lengths, costs=costs["8b"], **settings)
    seconds = time.process_time() - begin
    row = facts(lengths, costs, packed.indices, packed.bin_offsets, bins, budget) | speed(seconds, len(lengths))
    packed = plan(lengths, costs=costs["1b"], **settings)
    other = facts(lengths, costs, packed.indices, packed.bin_offsets, bins, budget)
    return row | {key: other[key] for key in ("cost_1b_mean", "cost_1b_worst")} | {"steps_1b": other["steps"]}


def speed(seconds: float, count: int) -> dict:
    return {"seconds": seconds, "us_per_sequence": 1e6 * seconds / count}


def scale(count: int) -> dict:
    """A row measured in this process: the plan of so many chats at 1024 bins, and the process's peak memory."""
    begin = time.perf_counter()
    plan([1], token_budget=1, bins_per_step=1, seed=0, epoch=0, costs=[1.0])
    lengths = chat_lengths(count)
    costs = model_costs(lengths, "8b")
    started, started_cpu = time.perf_counter(), time.process_time()
    packed = plan(lengths, token_budget=32768, bins_per_step=1024, seed=0, epoch=0, costs=costs)
    wall, seconds = time.perf_counter() - started, time.process_time() - started_cpu
    balance = packed.cost_imbalance()
    return {
        "set": "chat to 8192", "sequences": count, "bins": 1024, "budget": 32768, "packer": "ours",
        "steps": packed.num_steps, "floor": -(-int(lengths.sum(dtype=np.int64)) // (1024 * 32768)),
        "used_pct": 100.0, "fill_pct": 100 * packed.efficiency(),
        "cost_8b_mean": float(balance.mean()), "cost_8b_worst": float(balance.max()), "wall_seconds": wall,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "warm_up_s": started - begin,
        **speed(seconds, count),
    }  # fmt: skip


def start_up() -> dict:
    """Seconds from the import to the first plan of a million sequences, in a process of its own with a warm cache."""
    code = (
        "import time, numpy as np\n"
        "lengths = np.random.default_rng(1).integers(8, 2000, 1_000_000).astype(np.int32)\n"
        "cpu, wall = time.process_time(), time.perf_counter()\nfrom ochat.packing.multipack import plan\n"
        "packed = plan(lengths, token_budget=32768, bins_per_step=1024, seed=0, epoch=0)\n"
        "print(time.process_time() - cpu, time.perf_counter() - wall, packed.num_steps)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {
        "set": "import and first plan", "sequences": 1_000_000, "bins": 1024, "budget": 32768, "packer": "ours",
        "steps": int(output[2]), "wall_seconds": float(output[1]), **speed(float(output[0]), 1_000_000),
    }  # fmt: skip


def scale_apart(count: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.packing", "--scale", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def rows(path: Path | None, quick: bool) -> Iterator[dict]:
    """Every row as it is measured, without the public method where it would take minutes."""
    all_cases = list(cases(sets(path, 20_000 if quick else 1_000_000)))
    costs_of: dict[int, dict[str, NDArray]] = {}
    for name, lengths, bins, budget in track(all_cases, "packing", console=Console(stderr=True)):
        costs = costs_of.setdefault(id(lengths), {model: model_costs(lengths, model) for model in MODELS})
        for packer in ("ours", "public linear", "public quadratic"):
            if packer != "ours" and (
                bins >= 512 or len(lengths) > 20_000 and (bins, budget) not in {(8, 32768), (8, 8192)}
            ):
                continue
            head = {"set": name, "sequences": len(lengths), "bins": bins, "budget": budget, "packer": packer}
            yield head | measure(lengths, bins, budget, packer, costs)
    yield start_up()
    for count in (100_000,) if quick else (10_000_000, 100_000_000):
        yield scale_apart(count)


def show(measured: list[dict]) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_COLUMNS)
    table = Table(*SHOWN.values())
    for row in measured:
        table.add_row(*(_text(key, row.get(key)) for key in SHOWN))
    console.print(table)
    for row in measured:
        if "wall_seconds" in row:
            memory = f", peak {row['peak_rss_gib']:.2f} GiB" if "peak_rss_gib" in row else ""
            console.print(
                f"{row['set']}, {row['sequences']:,} at {row['bins']} bins: {row['seconds']:.2f} s of CPU, "
                f"{row['wall_seconds']:.2f} s on the clock{memory}"
            )


def _text(key: str, value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if key.startswith(("cost", "sq")) else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a JSON list of sequence lengths, at most 4096 tokens each")
    parser.add_argument("--quick", action="store_true", help="small sets, to try the program")
    parser.add_argument("--out", type=Path, help="the CSV that rows are added to")
    parser.add_argument("--scale", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.scale:
        return print(json.dumps(scale(arguments.scale)))
    plan([1], token_budget=1, bins_per_step=1, seed=0, epoch=0, costs=[1.0])  # compiles, or loads what was compiled
    for variant in ("linear", "quadratic"):
        pack_public(np.ones(1, np.int64), 1, 1, 0, variant)
    measured, file = [], csv_file.CsvFile(arguments.out, COLUMNS) if arguments.out else None
    for row in rows(arguments.lengths, arguments.quick):
        measured.append(row)
        if file:
            file.add(row | csv_file.stamp_cpu(COLUMNS))
    show(measured)


if __name__ == "__main__":
    main()
