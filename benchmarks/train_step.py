"""The whole training step beside its peers: the same conversations, model and optimizer, in turns, as rows of a CSV.

    PYTHONPATH=.:kernels python -m benchmarks.train_step --out DIR [--phase ours|peers] [--device cpu --quick]
    python -m benchmarks.train_step --out DIR --device cpu --base BASE --data DATA --token-budget 2048 --bins-per-step 2
The second compares everyone on a base and data of one's own; `--scaling` measures our own step over sizes. A round is
`--steps` steps on end; the first round warms up and is not timed. The losses of all must agree within LOSS_BOUND.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench, train_step_cases, train_step_scaling
from benchmarks.train_step_cases import PEERS, PHASES, QUICK, Case, World
from benchmarks.train_step_rounds import Session, Start, Taken, rates, take_turns
from benchmarks.train_step_worker import RUNNERS, WEIGHTED
from ochat.model.config import ModelConfig
from ochat.train import metrics

COMPARED_STEPS = 20
LOSS_BOUND = {"bfloat16": 0.01, "float32": 1e-4}  # largest relative difference from ours of any of these steps' losses
COLUMNS = [
    *("date", "commit", "device", "cpu", "cores", "threads", "load", "python", "torch", "triton", "transformers"),
    *("driver", "model", "token_budget", "bins_per_step", "dtype", "options", "implementation", "status"),
    *(
        "note",
        "rounds",
        "steps_per_round",
        "step_s",
        "step_s_p20",
        "step_s_p80",
        "cpu_s",
        "tokens_per_s",
        "tokens_per_s_p20",
    ),
    *("tokens_per_s_p80", "supervised_tokens_per_s", "padded_tokens_per_s", "mfu", "peak_tflops", "peak_gib"),
    *("first_loss", "last_loss", "compared_steps", "loss_difference", "ours_is_faster"),
]


def measure(case: Case, session: Session, given: World | None) -> Iterator[dict[str, Any]]:
    """The rows of one case, ours first, with which the others are compared. On a CPU all live side by side and take
    turns; a card has the memory of one at a time."""
    with tempfile.TemporaryDirectory(dir=session.folder) as folder:
        try:
            world = given or train_step_cases.make_world(case, Path(folder), session.device, session.num_steps)
        except Exception as problem:
            yield from (excused(case, name, "failed", reason(problem)) for name in case.implementations)
            return
        starts = [Start(name, case, world, Path(folder) / name) for name in case.implementations]
        ours: Taken | None = None
        for group in [starts] if session.device.type == "cpu" else [[each] for each in starts]:
            for who, taken in zip(group, take_turns(group, session), strict=True):
                ours = taken if who.name == "ours" and taken.is_measured else ours
                yield describe(who, taken, ours, session)


def describe(who: Start, taken: Taken, ours: Taken | None, session: Session) -> dict[str, Any]:
    """A row of what was measured, or of why nothing was."""
    case = who.case
    shape = {
        "model": case.model, "token_budget": case.token_budget,
        "bins_per_step": case.bins_per_step, "options": " ".join(case.options), "dtype": session.dtype,
        "threads": session.threads, "steps_per_round": session.steps, "peak_tflops": session.peak_flops / 1e12,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    if not taken.is_measured:
        return shape | excused(case, who.name, "failed", taken.failure)
    losses = losses_of(taken)
    row = shape | rates(taken.answers[1:], session, who.world.model)
    row |= {"implementation": who.name, "note": "; ".join(filter(None, (taken.note, taken.failure)))}
    row |= {"rounds": len(taken.answers) - 1, "first_loss": losses[0], "last_loss": losses[-1]}
    row["status"] = "ok" if who.name in WEIGHTED else "unweighted"
    if ours is not None and ours is not taken:
        row |= compare(losses, losses_of(ours))
        row["ours_is_faster"] = rates(ours.answers[1:], session, who.world.model)["tokens_per_s"] / row["tokens_per_s"]
        if who.name in WEIGHTED and not row["loss_difference"] <= LOSS_BOUND[session.dtype]:
            row["status"] = "disagrees"
    return row


def losses_of(taken: Taken) -> list[float]:
    """Of its steps, the warm-up's included."""
    return [loss for answer in taken.answers for loss in answer["losses"]]


def compare(losses: list[float], expected: list[float]) -> dict[str, float]:
    """The largest relative difference of the first COMPARED_STEPS losses, NaN if any is; how many of them there are."""
    pairs = list(zip(losses, expected, strict=False))[:COMPARED_STEPS]
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    return {"loss_difference": largest, "compared_steps": len(pairs)}


def late(case: Case) -> Iterator[dict[str, Any]]:
    """Rows of a case that was not begun."""
    return (excused(case, name, "skipped", "the time was out") for name in case.implementations)


def excused(case: Case, name: str, status: str, note: str) -> dict[str, Any]:
    return {"model": case.model, "implementation": name, "status": status, "note": note}


def reason(problem: Exception) -> str:
    text = str(problem).strip().split("\n")[0]
    return f"{type(problem).__name__}: {text}"[:200]


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    if "tokens_per_s" not in row:
        return f"{row['implementation']:8} {row['status']}: {row['note']}"
    text = f"{row['implementation']:8} {row['status']:10} {row['tokens_per_s']:9,.0f} tokens/s real"
    text += f" ({row['tokens_per_s_p20']:,.0f}-{row['tokens_per_s_p80']:,.0f})"
    text += f", {row['supervised_tokens_per_s']:,.0f} supervised, {row['padded_tokens_per_s']:,.0f} padded"
    text += f"; MFU {row['mfu']:.1%}; {row['peak_gib']:.2f} GiB; loss {row['first_loss']:.4f} to {row['last_loss']:.4f}"
    if "loss_difference" in row:
        text += f", from ours {row['loss_difference']:.1e}; ours is {row['ours_is_faster']:.2f} times as fast"
    return text


def stamp(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Where and with what a number was measured."""
    taken = bench.stamp(device, commit) | {"cpu": bench.cpu_name(), "cores": os.cpu_count()}
    taken["device"] = taken["device"] if device.type == "cuda" else "cpu"
    return taken | {"python": platform.python_version(), "transformers": version("transformers")}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def run(cases: list[Case], session: Session, given: World | None, rows: bench.Rows) -> bool:
    """Measures the cases until the deadline, on the user's base and data where given; whether ours ran everywhere and
    everyone agreed with it."""
    is_good = True
    for case in cases:
        print(case.title, flush=True)
        for row in measure(case, session, given) if session.seconds_left() > 0 else late(case):
            rows.add(session.stamp | row)
            print("   ", line(row), flush=True)
            is_good &= row["status"] != "disagrees" and (row["status"], row["implementation"]) != ("failed", "ours")
    return is_good


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    peak, _ = metrics.peak_flops(device, 0.0, getattr(torch, options.dtype))
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        session = Session(
            device, Path(folder), options.rounds, options.steps, options.threads, time.monotonic() + options.seconds,
            options.dtype, options.lr, peak, stamp(device, options.commit),
        )  # fmt: skip
        if options.scaling:
            train_step_scaling.run(session, options.out, quick=options.quick)
            return 0
        given = World(options.base, options.data, ModelConfig.load(options.base)) if options.base else None
        return 0 if run(chosen(options), session, given, bench.Rows(options.out / "train_step.csv", COLUMNS)) else 1


def chosen(options: argparse.Namespace) -> list[Case]:
    """The user's own case, or those of the phases."""
    if options.base:
        names = tuple(options.implementation or PEERS)
        return [Case(options.base.name, options.token_budget, options.bins_per_step, names)]
    table = QUICK if options.quick else PHASES
    return [case for phase in options.phase or table for case in table[phase]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description="times the whole step beside its peers")
    parser.add_argument("--out", type=Path, required=True, help="the folder of train_step.csv, to which rows are added")
    parser.add_argument("--phase", choices=list(PHASES), action="append", help="several may be given (default: all)")
    parser.add_argument("--scaling", action="store_true", help="our own step over sizes, instead")
    parser.add_argument("--base", type=Path, help="a base model's folder, instead of the phases' models")
    parser.add_argument("--data", type=Path, help="a folder that `ochat prepare` wrote for this base")
    parser.add_argument("--token-budget", type=int, default=2048, help="of --base: tokens of a micro-batch of ours")
    parser.add_argument("--bins-per-step", type=int, default=2, help="of --base: micro-batches of a step")
    parser.add_argument("--implementation", choices=list(RUNNERS), action="append", help="of --base (default: all)")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--dtype", choices=list(LOSS_BOUND), default="bfloat16", help="of the computation")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models: shows that everything runs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="what is not done by then is left out")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git")
    options = parser.parse_args(arguments)
    if (options.base is None) != (options.data is None):
        parser.error("--base and --data come together")
    if options.device == "cpu" and not (options.quick or options.base or options.scaling):
        parser.error("--device cpu takes --quick, --scaling, or --base and --data: the phases' models are for a card")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; the dry run is --device cpu --quick")
    if options.quick:
        options.rounds, options.steps, options.threads, options.dtype = 1, 10, 1, "float32"
    return options


if __name__ == "__main__":
    sys.exit(main())
