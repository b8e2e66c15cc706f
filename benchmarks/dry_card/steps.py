"""Our whole steps on the dry card, beside the plan: peak memory, waits of the host, its time to queue a step.

    eval "$(python -m benchmarks.dry_card.build /tmp/dry_card)"; python -m benchmarks.dry_card.steps --out dry_card.csv
Memory is what torch's own CUDA allocator gave out, the step's tensors in the order and sizes of a real one; weights and
results are no values. Each case has processes of its own, several under FSDP. Letters as in cases.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import bench, train_step_cases, train_step_forecast
from benchmarks.train_step_cases import CLASSES, IN_BACKWARD, PHASES, Case, World
from benchmarks.train_step_peers import Ours, Peer
from ochat import config as configuration
from ochat.checkpoint import load as checkpoint
from ochat.distributed import processes as processes_module
from ochat.plan.gpus import GPUS
from ochat.plan.memory import GIB
from ochat.train import verify
from ochat.train.metrics import peak_memory_gib

STEPS = 6  # after the first, which compiles
OFFLOADED = ("--train.recompute=block", "--train.offload_activations=true")
CASES = [
    *((1, case) for case in PHASES["ours"]),
    (1, Case("Llama-3-8B", 16384, 1, options=(*IN_BACKWARD, "--train.recompute=elementwise"))),
    (1, Case("Llama-3-8B", 16384, 1, options=(*IN_BACKWARD, "--train.recompute=block"))),
    (1, Case("Llama-3-8B", 16384, 1, options=(*IN_BACKWARD, *OFFLOADED))),
    (2, Case("Llama-3-8B", 8192, 4)),
    (2, Case("Llama-3-8B", 16384, 2, options=("--train.recompute=block",))),
    (2, Case("Llama-3-8B", 8192, 2, options=("--parallel.reduce=micro_batch",))),
    (4, Case("Llama-3-8B", 16384, 4)),
    (4, Case("Llama-3-8B", 16384, 8, options=("--parallel.reduce=micro_batch",))),
]  # processes, and what they do
COLUMNS = [
    *(
        "date",
        "commit",
        "cpu",
        "python",
        "torch",
        "triton",
        "processes",
        "model",
        "token_budget",
        "bins_per_step",
        "options",
    ),
    *("recompute", "predicted_gib", "of_it_allowance_gib", "allocated_gib", "reserved_gib"),
    *("host_ms", "host_least_ms", "host_most_ms", "predicted_step_ms", "waits"),
]


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One case in this process: what its steps took."""
    world = World(folder / "base", folder / "data", train_step_cases.model_config(case), CLASSES)
    world.base.mkdir()
    (world.base / "config.json").write_text(json.dumps(world.model.to_hf()), encoding="utf-8")
    train_step_cases.write_tokenizer(world.base)
    train_step_cases.write_data(world, case, STEPS + 1)
    (folder / "run.toml").touch()
    settings = {"base.path": world.base, "data.path": world.data, "run.dir": folder / "run", "optim.lr": 1e-5}
    options = [*train_step_cases.options(case, settings), *world.options]
    config = configuration.load(folder / "run.toml", options)
    with (
        mock.patch.object(verify, "headers"),
        mock.patch.object(verify, "base"),
        mock.patch.object(checkpoint, "load_base"),
    ):
        ours = Ours(config, torch.device("cuda"), Peer())
    ours.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        taken_ms = [_milliseconds(ours) for _ in range(STEPS)]
        torch.cuda.set_sync_debug_mode("default")
    return {
        "recompute": ours.trainer.model.recompute,
        "allocated_gib": peak_memory_gib(torch.device("cuda")), "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "host_ms": statistics.median(taken_ms), "host_least_ms": min(taken_ms), "host_most_ms": max(taken_ms),
        "waits": sum("called a synchronizing" in str(each.message) for each in caught),
    }  # fmt: skip


def _milliseconds(ours: Ours) -> float:
    start = time.perf_counter()
    ours.step()
    return (time.perf_counter() - start) * 1e3


def row_of(index: int) -> dict[str, Any]:
    """A case measured in processes of its own, beside what the plan says of it."""
    processes, case = CASES[index]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.dry_card.steps", "--case", str(index)]
    environment = os.environ | {"DRY_CARD_DEVICES": str(processes)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case.title} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    expected = train_step_forecast.predict(case, GPUS["H200"], processes)
    row = {
        "processes": processes,
        "model": case.model,
        "token_budget": case.token_budget,
        "bins_per_step": case.bins_per_step,
    }
    row |= {"options": " ".join(case.options), "predicted_step_ms": expected.speed.step_seconds * 1e3}
    row |= {"predicted_gib": expected.use.total / GIB, "of_it_allowance_gib": expected.use.allowance / GIB}
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.dry_card.steps", description="our whole steps on the dry card, beside the plan"
    )
    parser.add_argument("--out", type=Path, help="the CSV; a table is printed too")
    parser.add_argument("--case", type=int, help="this one alone, as a line of JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            'torch sees no card; first eval "$(python -m benchmarks.dry_card.build FOLDER)", with a CUDA build of torch'
        )
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            measured = json.dumps(measure(CASES[options.case][1], Path(folder)))
        if os.environ.get("RANK", "0") == "0":
            print(measured, flush=True)
        processes_module.stop()
        return
    if options.out is None:
        parser.error("--out is needed")
    stamp = {key: value for key, value in bench.stamp(torch.device("cpu")).items() if key in COLUMNS}
    stamp |= {"cpu": bench.cpu_name(), "python": platform.python_version()}
    rows, file = [], bench.Rows(options.out, COLUMNS)
    for index, (processes, case) in enumerate(CASES):
        print(f"{index + 1}/{len(CASES)}  {case.title}, {processes} process{'es' * (processes > 1)}", flush=True)
        rows.append(stamp | row_of(index))
        file.add(rows[-1])
    file.close()
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """A line a case."""
    table = Table(
        "processes",
        "model",
        "micro-batches",
        "options",
        "recompute",
        *("predicted", "reserved", "allocated"),
        "host ms",
        "card ms",
        "waits",
    )
    for row in rows:
        sizes = [f"{row[name]:.1f}" for name in ("predicted_gib", "reserved_gib", "allocated_gib")]
        times = [
            f"{row['host_ms']:.0f} ({row['host_least_ms']:.0f}-{row['host_most_ms']:.0f})",
            f"{row['predicted_step_ms']:.0f}",
        ]
        cut = f"{row['bins_per_step']} x {row['token_budget']:,}"
        table.add_row(
            str(row["processes"]),
            row["model"],
            cut,
            row["options"],
            row["recompute"],
            *sizes,
            *times,
            str(row["waits"]),
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
