"""Run our whole steps on the fake CUDA device: peak memory, synchronisations, host time; and what the plan predicts.

    eval "$(python -m benchmarks.fake_cuda.build /tmp/fake_cuda)"; python -m benchmarks.fake_cuda.steps --out OUT.csv
Memory is what torch's own CUDA allocator gave out; weights and results have no values. Each case has processes of its
own, several under FSDP. Letters as in cases.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import bare_world, csv_file, step_cases
from benchmarks.fake_cuda import launches
from benchmarks.step_cases import BF16, IN_BACKWARD, PHASES, Case, Peer
from benchmarks.step_peers import Ours
from ochat import config as configuration
from ochat.distributed import processes
from ochat.plan.gpus import GPUS
from ochat.plan.memory import GIB
from ochat.train.metrics import peak_memory_gib

ODD = 13 * 1024  # tokens of a micro-batch: none of its tensors has as many elements as a weight
SMALLEST = 2**20  # elements of what counts as a weight: no norms, no adapters
STEPS = 6  # after the first, which compiles
OFFLOADED = ("--train.recompute=block", "--train.offload_activations=true")
CASES = [
    *(case for case in PHASES["ours"] if case.model in ("Llama-3-8B", "Llama-2-7B") or case.bins_per_step == 4),
    Case("Llama-3-8B", 16384, 1, options=(*IN_BACKWARD, *OFFLOADED)),
    Case("Llama-3-8B", 8192, 4, processes=2),
    Case("Llama-3-8B", ODD, 1, options=IN_BACKWARD),
    Case("Llama-3-8B", ODD, 2, options=(*BF16, "--train.recompute=elementwise")),
    Case("Llama-3-8B", ODD, 2, options=("--train.recompute=block",)),
    Case("Llama-3-8B", ODD, 2, options=(*BF16, "--train.linear=fp8")),
    Case("Llama-3-8B", ODD, 2, options=("--lora.rank=16", "--lora.tokens=none")),
    Case("Llama-3.2-1B", ODD, 4),
    Case("Llama-3-8B", ODD, 4, processes=2),
    Case("Llama-3.2-1B", ODD, 4, processes=2, options=("--parallel.reduce=micro_batch",)),
    Case("Llama-3.2-1B", ODD, 4, options=("--loss.dynamic=eaft",)),
    Case("Llama-3.2-1B", ODD, 4, options=("--optim.ema=0.999",)),
]
COLUMNS = [
    *("date", "commit", "cpu", "python", "torch", "triton", "processes", "model", "token_budget", "bins_per_step"),
    *("options", "recompute", "predicted_gib", "of_it_allowance_gib", "allocated_gib", "reserved_gib"),
    *("host_ms", "host_least_ms", "host_most_ms", "predicted_step_ms", "waits", *launches.KINDS, "weight_sized"),
]


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One case in this process: memory, host time and synchronisations of its steps."""
    world = bare_world.make(case, folder, STEPS + 2)
    (folder / "run.toml").touch()
    settings = {"base.path": world.base, "data.path": world.data, "run.dir": folder / "run", "optim.lr": 1e-5}
    settings["train.attention"] = "varlen"  # "auto" compares values
    config = configuration.load(folder / "run.toml", [*step_cases.options(case, settings), *world.options])
    with bare_world.weights_are(bare_world.left):
        ours = Ours(config, torch.device("cuda"), Peer())
    ours.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        taken_ms = [_milliseconds(ours) for _ in range(STEPS)]
        torch.cuda.set_sync_debug_mode("default")
    with launches.recorded() as found:
        ours.step()
    return launches.counts(found) | {
        "weight_sized": _weight_sized(case, ours, found),
        "recompute": ours.trainer.model.recompute,
        "allocated_gib": peak_memory_gib(torch.device("cuda")), "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "host_ms": statistics.median(taken_ms), "host_least_ms": min(taken_ms), "host_most_ms": max(taken_ms),
        "waits": sum("called a synchronizing" in str(each.message) for each in caught),
    }  # fmt: skip


def _weight_sized(case: Case, ours: Ours, found: list[dict[str, Any]]) -> str:
    """launches.weight_sized for the matrices and their shards; nothing at micro-batches where it could err."""
    if not is_odd(case):
        return ""
    weights = {p.numel() for p in ours.trainer.model.parameters() if p.numel() >= SMALLEST}
    sizes = weights | {size // case.processes for size in weights}
    return "; ".join(f"{count} x {name}" for name, count in launches.weight_sized(found, sizes).items()) or "none"


def is_odd(case: Case) -> bool:
    """Whether nothing but weights has a weight's size."""
    return case.token_budget == ODD


def _milliseconds(ours: Ours) -> float:
    """Of the processor, which other work on the machine disturbs less."""
    start = time.process_time()
    ours.step()
    return (time.process_time() - start) * 1e3


def row_of(index: int) -> dict[str, Any]:
    """A case measured in processes of its own, and what the plan says of it."""
    case = CASES[index]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    launcher = torchrun if case.processes > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.fake_cuda.steps", "--case", str(index)]
    environment = os.environ | {"FAKE_CUDA_DEVICES": str(case.processes)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{case.title} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    expected = step_cases.predict(case, GPUS["H200"], case.processes)
    row = {name: getattr(case, name) for name in ("processes", "model", "token_budget", "bins_per_step")}
    row |= {"options": " ".join(case.options), "predicted_step_ms": expected.speed.step_seconds * 1e3}
    row |= {"predicted_gib": expected.use.total / GIB, "of_it_allowance_gib": expected.use.allowance / GIB}
    return row | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fake_cuda.steps", description="whole steps on the fake device")
    parser.add_argument("--out", type=Path, help="the CSV; a table is printed too")
    parser.add_argument("--case", type=int, help="this one alone, as a line of JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        build = 'first eval "$(python -m benchmarks.fake_cuda.build FOLDER)"'
        sys.exit(f"torch sees no CUDA device; {build}, with a CUDA build of torch")
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            measured = json.dumps(measure(CASES[options.case], Path(folder)))
        if os.environ.get("RANK", "0") == "0":
            print(measured, flush=True)
        return processes.stop()
    if options.out is None:
        parser.error("--out is needed")
    table = Table("processes", "model", "micro-batches", "options", "recompute", "predicted", "reserved", "allocated",
                  "host ms", "GPU ms", "waits")  # fmt: skip
    file = csv_file.CsvFile(options.out, COLUMNS)
    for index, case in enumerate(CASES):
        print(f"{index + 1}/{len(CASES)}  {case.title}, processes: {case.processes}", flush=True)
        row = csv_file.stamp_cpu(COLUMNS) | row_of(index)
        file.add(row)
        sizes = [f"{row[name]:.1f}" for name in ("predicted_gib", "reserved_gib", "allocated_gib")]
        host = f"{row['host_ms']:.0f} ({row['host_least_ms']:.0f}-{row['host_most_ms']:.0f})"
        cells = [row["processes"], row["model"], f"{row['bins_per_step']} x {row['token_budget']:,}", row["options"]]
        cells += [row["recompute"], *sizes, host, f"{row['predicted_step_ms']:.0f}", row["waits"]]
        table.add_row(*map(str, cells))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
