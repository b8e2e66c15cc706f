"""Measure packing: number of steps, balance of work, mixing, speed; ours and the public method. No GPU, one core.

    python -m benchmarks.packing [--lengths LENGTHS.json] [--quick] [--out benchmarks/results/packing.csv]
    python -m benchmarks.packing --scale 100000000      # time and peak memory of so many chats at 1,024 bins
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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        share = rng.uniform(0.3, 0.9, len(piece))
        costs[begin : begin + (1 << 20)] = piece * (token + square * piece + supervised * share)
    return costs


def cases(path: Path | None, count: int) -> Iterator[tuple[str, NDArray, int, int]]:
    """Name and lengths of a set, bins per step, token budget."""
    rng, sets = np.random.default_rng(0), {}
    drawn = {
        "chat to 8192": chat_lengths(count),
        "uniform to 2048": rng.integers(1, 2049, count),
        "uniform to 8192": rng.integers(1, 8193, count),
    }
    if path is not None:
        own = np.array(json.loads(path.read_text(encoding="utf-8")))
        sets = {path.stem: own, f"{path.stem}, drawn": rng.choice(own, count)}
    for name, lengths in (sets | drawn).items():
        for shape in ((1, 8192), (8, 8192), (64, 8192)) if name == "uniform to 8192" else SHAPES + SHORT_BINS:
            yield name, lengths, *shape


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
) -> dict[str, Any]:
    """Steps, fill, balance and mixing of a plan."""
    num_steps, total, used = (len(offsets) - 1) // bins, int(lengths.sum()), int(lengths[indices].sum())
    classes = np.random.default_rng(3).random(len(lengths)) < np.clip(lengths / 2000, 0.1, 0.9)  # experts write more
    row: dict[str, Any] = {"steps": num_steps, "floor": -(-total // (bins * budget)), "used_pct": 100 * used / total}
    row["fill_pct"] = 100 * used / (num_steps * bins * budget) if num_steps else math.nan
    measures = {f"cost_{model}": cost for model, cost in costs.items()} | {"sq": lengths.astype(float) ** 2}
    for name, values in measures.items():
        row[f"{name}_mean"], row[f"{name}_worst"] = imbalance(values[indices], offsets, bins)
    for name, values in {"mixing_length": lengths, "mixing_class": classes}.items():
        row[name] = mixing(values[indices], values, offsets, bins)
    return row


def measure(lengths: NDArray, bins: int, budget: int, packer: str, costs: dict[str, NDArray]) -> dict[str, Any]:
    """A row of one packer; ours is planned for both models."""
    settings = {"token_budget": budget, "bins_per_step": bins, "seed": 0, "epoch": 0}
    begin = time.process_time()
    if packer == "ours":
        packed = plan(lengths, costs=costs["8b"], **settings)
        indices, offsets = packed.indices, packed.bin_offsets
    else:
        indices, offsets, _ = pack_public(lengths, bins, budget, 0, packer.removeprefix("public "))
    seconds = time.process_time() - begin
    row = facts(lengths, costs, indices, offsets, bins, budget)
    row |= {"seconds": seconds, "us_per_sequence": 1e6 * seconds / len(lengths)}
    if packer != "ours":
        return row
    packed = plan(lengths, costs=costs["1b"], **settings)
    other = facts(lengths, costs, packed.indices, packed.bin_offsets, bins, budget)
    return row | {key: other[key] for key in ("cost_1b_mean", "cost_1b_worst")} | {"steps_1b": other["steps"]}


def scale(count: int) -> dict[str, Any]:
    """The plan of so many chats at 1,024 bins: seconds, and the process's peak memory."""
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
        "used_pct": 100.0, "fill_pct": 100 * packed.efficiency(), "cost_8b_mean": float(balance.mean()),
        "cost_8b_worst": float(balance.max()), "wall_seconds": wall, "warm_up_s": started - begin,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": seconds, "us_per_sequence": 1e6 * seconds / count,
    }  # fmt: skip


def rows(path: Path | None, quick: bool) -> Iterator[dict[str, Any]]:
    """Every row as it is measured, without the public method where it would take minutes."""
    costs_of: dict[int, dict[str, NDArray]] = {}
    for name, lengths, bins, budget in cases(path, 20_000 if quick else 1_000_000):
        costs = costs_of.setdefault(id(lengths), {model: model_costs(lengths, model) for model in MODELS})
        is_quick = bins < 512 and (len(lengths) <= 20_000 or (bins, budget) in {(8, 32768), (8, 8192)})
        for packer in ("ours", "public linear", "public quadratic") if is_quick else ("ours",):
            head = {"set": name, "sequences": len(lengths), "bins": bins, "budget": budget, "packer": packer}
            yield head | measure(lengths, bins, budget, packer, costs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="a JSON list of sequence lengths, at most 4096 tokens each")
    parser.add_argument("--quick", action="store_true", help="small sets, to try the program")
    parser.add_argument("--out", type=Path, help="the CSV that rows are added to")
    parser.add_argument("--scale", type=int, help="plan so many chats instead")
    options = parser.parse_args()
    plan([1], token_budget=1, bins_per_step=1, seed=0, epoch=0, costs=[1.0])  # compiles
    for variant in ("linear", "quadratic"):
        pack_public(np.ones(1, np.int64), 1, 1, 0, variant)
    file = csv_file.CsvFile(options.out, COLUMNS) if options.out else None
    for row in [scale(options.scale)] if options.scale else rows(options.lengths, options.quick):
        texts = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print(", ".join(f"{key} {value}" for key, value in texts.items()), flush=True)
        if file:
            file.add(row | csv_file.stamp_cpu(COLUMNS))


if __name__ == "__main__":
    main()
