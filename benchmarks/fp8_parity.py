"""Train the same model on the same data with bf16 and with fp8 linears, and compare the losses step by step.

    PYTHONPATH=.:kernels python -m benchmarks.fp8_parity --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data chats.jsonl.xz \\
        --work DIR --out benchmarks/results --picture docs/pictures/fp8_parity.svg
On a CPU, whose products are the definition's: 200 steps of 1,024 tokens take about 25 minutes of a core in bf16 and 35
in fp8. A run that was stopped continues; `--report` only writes what the runs in DIR have reached. Both runs of a seed
see the same tokens in the same order, so their difference has none of the spread between batches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.csv_file import CsvFile, stamp_cpu

LINEARS = ("bf16", "fp8")
COLUMNS = [
    *("date", "commit", "device", "cpu", "python", "torch", "model", "token_budget", "seed", "step"),
    *("tokens", "bf16_loss", "fp8_loss", "bf16_held_out", "fp8_held_out"),
]
TEMPLATE, END_OF_TURN = "openchat_v3.2", "<|end_of_turn|>"
REWARDS = {"GPT4": 1.0, "GPT3": 0.1}
HELD_OUT = 0.01
EVALUATIONS, CHECKPOINTS = 4, 4  # of a run
GROUP = 50  # steps of a row of the table
SMOOTHED = 20  # steps of a point of the picture

console = Console(width=120)


def make_inputs(options: argparse.Namespace) -> None:
    """The base and the data of all runs, once."""
    base, data = options.work / "base", options.work / "data"
    if not base.exists():
        ochat("init-base", "--gguf", options.gguf, "--add-token", END_OF_TURN, base)
    if not data.exists():
        ochat(
            "prepare", "--input", options.data, "--base", base, "--template", TEMPLATE, "--output", data, "--context",
            options.tokens, "--over-long", "drop", "--held-out", HELD_OUT, "--no-progress",
        )  # fmt: skip


def train(options: argparse.Namespace, linear: str, seed: int) -> None:
    """A run, or the rest of it."""
    work = options.work
    config = work / "config.toml"
    config.write_text("".join(f"[classes.{name}]\nreward = {reward}\n" for name, reward in REWARDS.items()))
    settings = {
        "run.dir": run_dir(work, linear, seed), "run.seed": seed, "base.path": work / "base",
        "data.path": work / "data", "data.eval_path": work / "data-held-out",
        "data.token_budget": options.tokens, "data.bins_per_step": 1, "data.max_steps": options.steps,
        "optim.lr": options.lr, "optim.eps": 1e-8, "train.linear": linear,
        "train.eval_every": options.steps // EVALUATIONS, "train.device": "cpu", "train.peak_tflops": 0.1,
        "checkpoint.every": options.steps // CHECKPOINTS, "checkpoint.keep": 1,
    }  # fmt: skip
    ochat("train", config, *(f"--{key}={value}" for key, value in settings.items()))


def ochat(*words: object) -> None:
    """A command of this checkout, niced: it takes hours."""
    command = ["nice", "-n", "10", sys.executable, "-m", "ochat", *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_dir(work: Path, linear: str, seed: int) -> Path:
    return work / "runs" / f"{linear}-seed{seed}"


def losses(work: Path, linear: str, seed: int) -> dict[int, dict[str, float]]:
    """step -> loss and tokens of the step, and the held-out loss after it where there is one; step 0: before any."""
    found: dict[int, dict[str, float]] = {}
    for name, key in (("metrics", "loss"), ("eval", "held_out")):
        path = run_dir(work, linear, seed) / f"{name}.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for line in map(json.loads, lines):
            found.setdefault(line["step"], {})[key] = line["loss"]
            if "tokens" in line:
                found[line["step"]]["tokens"] = line["tokens"]
    return found


def pairs(work: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The steps that both runs of a seed have done."""
    bf16, fp8 = (losses(work, linear, seed) for linear in LINEARS)
    for step in sorted(bf16.keys() & fp8.keys()):
        row = {"seed": seed, "step": step, "tokens": bf16[step].get("tokens")}
        for linear, values in zip(LINEARS, (bf16[step], fp8[step]), strict=True):
            row |= {f"{linear}_{key}": values.get(key) for key in ("loss", "held_out")}
        yield row


def write(options: argparse.Namespace) -> None:
    """The CSV, replaced, and a table of it."""
    path = options.out / "fp8_parity.csv"
    path.unlink(missing_ok=True)
    stamp = stamp_cpu(COLUMNS, options.commit) | {"model": options.gguf.stem, "token_budget": options.tokens}
    rows = [row for seed in options.seeds for row in pairs(options.work, seed)]
    file = CsvFile(path, COLUMNS)
    for row in rows:
        file.add(stamp | row)
    console.print(table(rows))
    if options.picture:
        draw(rows, options.picture)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses and their difference, each the mean of SMOOTHED steps, a line a seed."""
    figure = Figure(figsize=(8, 5), layout="tight")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for number, seed in enumerate(sorted({row["seed"] for row in rows})):
        steps = [row for row in rows if row["seed"] == seed and row["step"]]
        bf16, fp8 = (np.array([row[f"{linear}_loss"] for row in steps]) for linear in LINEARS)
        places = np.arange(SMOOTHED, len(steps) + 1)
        dashes = ("-", "--")[number % 2]
        above.plot(places, smoothed(bf16), dashes, color="tab:blue", label=f"bf16, seed {seed}")
        above.plot(places, smoothed(fp8), dashes, color="tab:orange", label=f"fp8, seed {seed}")
        below.plot(places, smoothed(fp8 - bf16), dashes, color="tab:red", label=f"seed {seed}")
    below.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("loss")
    below.set_ylabel("fp8 less bf16")
    below.set_xlabel(f"step; each point is the mean of the {SMOOTHED} steps before it")
    for axes in (above, below):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # the same file for the same numbers
        figure.savefig(path, metadata={"Date": None})


def smoothed(values: np.ndarray) -> np.ndarray:
    return np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), "valid")


def table(rows: list[dict[str, Any]]) -> Table:
    """Means of GROUP steps of each seed, and of all; the differences' standard error shows what they can say."""
    made = Table("seed", "steps", "bf16", "fp8", "fp8 - bf16", "standard error", "held out, bf16", "held out, fp8")
    groups = [
        (f"{seed}", [row for row in rows if row["seed"] == seed]) for seed in sorted({row["seed"] for row in rows})
    ]
    for name, chosen in groups:
        last = chosen[-1]["step"] if chosen else 0
        for first in range(1, last + 1, GROUP):
            made.add_row(name, *_cells([row for row in chosen if first <= row["step"] < first + GROUP]))
        made.add_row(name, *_cells(chosen))
    made.add_row("all", *_cells(rows))
    return made


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    trained = [row for row in rows if row["bf16_loss"] is not None and row["fp8_loss"] is not None]
    measured = [row for row in rows if row["bf16_held_out"] is not None and row["fp8_held_out"] is not None]
    held_out = [f"{measured[-1][f'{linear}_held_out']:.4f}" if measured else "" for linear in LINEARS]
    if len(trained) < 2:
        return ["", "", "", "", "", *held_out]
    differences = [row["fp8_loss"] - row["bf16_loss"] for row in trained]
    means = [statistics.mean(row[f"{linear}_loss"] for row in trained) for linear in LINEARS]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    steps = f"{trained[0]['step']}-{trained[-1]['step']}"
    return [steps, *(f"{mean:.4f}" for mean in means), f"{means[1] - means[0]:+.4f}", f"{error:.4f}", *held_out]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gguf", type=Path, required=True, help="the model's weights")
    parser.add_argument(
        "--data", type=Path, required=True, help="conversations of the classes " + " and ".join(REWARDS)
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder for base, data and runs")
    parser.add_argument("--out", type=Path, required=True, help="the folder of fp8_parity.csv, which is replaced")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step; longer conversations are left out")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--commit", help="the commit that is measured, where it is not this one")
    parser.add_argument("--picture", type=Path, help="an SVG file for the curves")
    parser.add_argument("--report", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        make_inputs(options)
    for seed in options.seeds:
        for linear in LINEARS if not options.report else ():
            train(options, linear, seed)
            write(options)
    write(options)


if __name__ == "__main__":
    main()
