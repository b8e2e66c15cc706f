"""Time the whole training step and its peers: the same conversations, model and optimizer, in turns; rows of a CSV.

    PYTHONPATH=.:kernels python -m benchmarks.train_step --out DIR [--phase ours|peers] [--device cpu --quick]
    python -m benchmarks.train_step --out DIR --device cpu --base BASE --data DATA --token-budget 2048 --bins-per-step 2
The second compares everyone on your own base and data; `--scaling` measures our step over sizes. A round is `--steps`
steps; the first round warms up and is not timed. The losses of all must agree within LOSS_BOUND.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ochat_kernels.compiled import has_compiler

from benchmarks import bare_world, command_line, csv_file, smoke, step_cases, step_profile, timing
from benchmarks.step_cases import OURS, PEERS, PHASES, QUICK, SCALING_AXES, Case, World
from benchmarks.step_peers import RUNNERS, WEIGHTED
from benchmarks.step_profile import Ran, Work
from benchmarks.step_worker import Session, Start, Taken, rates, take_turns
from ochat.model.config import ModelConfig
from ochat.train import metrics

COMPARED_STEPS = 20
LOSS_BOUND = {"bfloat16": 0.01, "float32": 1e-4}  # largest relative difference from ours of any of these steps' losses
COLUMNS = [
    *("date", "commit", "device", "cpu", "cores", "threads", "processes", "load", "python", "torch", "triton"),
    *("transformers", "driver", "model", "token_budget", "bins_per_step", "longest", "supervised", "dtype", "options"),
    *("axis", "implementation", "status", "note", "rounds", "steps_per_round", "step_s", "step_s_p20", "step_s_p80"),
    *("cpu_s", "tokens_per_s", "tokens_per_s_p20", "tokens_per_s_p80", "supervised_tokens_per_s"),
    *("padded_tokens_per_s", "mfu", "peak_tflops", "peak_gib"),
    *("first_loss", "last_loss", "compared_steps", "loss_difference", "ours_is_faster"),
]


def measure(cases: list[Case], session: Session, given: World | None) -> Iterator[dict[str, Any]]:
    """The rows of cases that take turns; in each, ours is first, and the others are compared with it. On a CPU all
    processes live at once; a GPU holds one at a time."""
    with tempfile.TemporaryDirectory(dir=session.folder) as folder:
        starts = []
        for number, case in enumerate(cases):
            where = Path(folder) / str(number)
            try:
                world = given or make_world(case, where / "world", session)
            except Exception as problem:
                yield from excused(case, "failed", timing.reason(problem))
                continue
            starts += [Start(name, case, world, where / name) for name in case.implementations]
        ours: dict[Case, Taken] = {}
        for group in [starts] if session.device.type == "cpu" else [[each] for each in starts]:
            for who, taken in zip(group, take_turns(group, session), strict=True):
                if who.name == "ours" and taken.is_measured:
                    ours[who.case] = taken
                if taken.profile:
                    write_kernels(who.case, taken.profile, session)
                yield describe(who, taken, ours.get(who.case), session)


def make_world(case: Case, folder: Path, session: Session) -> World:
    """A world on which all train the same weights; where ours is alone, it draws them itself: a file of 16 GB takes
    longer than its steps."""
    if case.implementations == OURS and case.processes == 1:
        return bare_world.make(case, folder, session.num_steps)
    return step_cases.make_world(case, folder, session.device, session.num_steps)


def describe(who: Start, taken: Taken, ours: Taken | None, session: Session) -> dict[str, Any]:
    """A row of what was measured, or of why nothing was."""
    case = who.case
    names = ("model", "token_budget", "bins_per_step", "longest", "supervised", "processes")
    shape = {name: getattr(case, name) for name in names} | {
        "options": " ".join(case.options), "dtype": session.dtype, "load": os.getloadavg()[0],
        "threads": 1 if case.processes > 1 else session.threads, "steps_per_round": session.steps,
        "peak_tflops": session.peak_flops / 1e12, "implementation": who.name,
    }  # fmt: skip
    if not taken.is_measured:
        return shape | {"status": "failed", "note": taken.failure}
    losses = losses_of(taken)
    row = shape | rates(taken.answers[1:], session, who.world.model)
    row |= {"note": "; ".join(filter(None, (taken.note, taken.failure))), "rounds": len(taken.answers) - 1}
    row |= {"first_loss": losses[0], "last_loss": losses[-1]}
    row["status"] = "ok" if who.name in WEIGHTED else "unweighted"
    if ours is not None and ours is not taken:
        row |= compare(losses, losses_of(ours))
        row["ours_is_faster"] = rates(ours.answers[1:], session, who.world.model)["tokens_per_s"] / row["tokens_per_s"]
        if who.name in WEIGHTED and not row["loss_difference"] <= LOSS_BOUND[session.dtype]:
            row["status"] = "disagrees"
    return row


def write_kernels(case: Case, profile: dict[str, Any], session: Session) -> None:
    """The step's longest kernels, as rows of kernels.csv."""
    ceilings = smoke.read(session.out, session.device) or timing.measure_ceilings(session.device, quick=True)
    ran = [Ran(kernel, name, tuple(map(tuple, shapes)), us) for kernel, name, shapes, us in profile["ran"]]
    names = ("model", "token_budget", "bins_per_step")
    shape = {name: getattr(case, name) for name in names} | {"options": " ".join(case.options)}
    known = {name: value for name, value in session.stamp.items() if name in step_profile.COLUMNS} | shape
    rows = csv_file.CsvFile(session.out / "kernels.csv", step_profile.COLUMNS)
    for row in step_profile.longest(ran, Work.of(case, profile["square_lengths"]), ceilings):
        rows.add(known | row)


def losses_of(taken: Taken) -> list[float]:
    """The losses of its steps, the warm-up's included."""
    return [loss for answer in taken.answers for loss in answer["losses"]]


def compare(losses: list[float], expected: list[float]) -> dict[str, float]:
    """The largest relative difference of the first COMPARED_STEPS losses, NaN if any is; and how many were compared."""
    pairs = list(zip(losses, expected, strict=False))[:COMPARED_STEPS]
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    return {"loss_difference": largest, "compared_steps": len(pairs)}


def excused(case: Case, status: str, note: str) -> Iterator[dict[str, Any]]:
    """Rows that say why there is no number."""
    for name in case.implementations:
        yield {"model": case.model, "implementation": name, "status": status, "note": note}


def line(row: dict[str, Any]) -> str:
    """A row for the screen."""
    if "tokens_per_s" not in row:
        return f"{row['implementation']:8} {row['status']}: {row['note']}"
    text = f"{row['implementation']:8} {row['status']:10} {row['tokens_per_s']:9,.0f} tokens/s"
    text += f", {row['step_s'] * 1e3:,.1f} ms a step, MFU {row['mfu']:.1%}, {row['peak_gib']:.2f} GiB"
    text += f", loss {row['first_loss']:.4f} to {row['last_loss']:.4f}"
    if "loss_difference" in row:
        text += f", from ours {row['loss_difference']:.1e}; ours is {row['ours_is_faster']:.2f} times as fast"
    return text


def run(groups: list[list[Case]], session: Session, given: World | None, rows: Any) -> bool:
    """Measure groups of cases until the deadline, on the user's base and data where given; return whether ours ran
    everywhere and everyone agreed with it."""
    is_good = True
    for cases in groups:
        for case in cases:
            print(case.title, flush=True)
        axis = next((a for a, field in SCALING_AXES.items() if len({getattr(case, field) for case in cases}) > 1), "")
        is_late = session.seconds_left() <= 0
        late = (row for case in cases for row in excused(case, "skipped", "the time was out"))
        for row in late if is_late else measure(cases, session, given):
            rows.add(session.stamp | row | {"axis": axis})
            print("   ", line(row), flush=True)
            is_good &= row["status"] != "disagrees" and (row["status"], row["implementation"]) != ("failed", "ours")
    return is_good


def stamp(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Where and by what a number was measured."""
    try:
        transformers = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        transformers = ""
    known = csv_file.stamp_cpu(COLUMNS, commit) | {"cores": os.cpu_count(), "transformers": transformers}
    return known | (csv_file.stamp(device, commit) if device.type == "cuda" else {})


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    peak, _ = metrics.peak_flops(device, 0.0, getattr(torch, options.dtype))
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        session = Session(
            device, Path(folder), options.out, options.rounds, options.steps, options.warmup, options.threads,
            time.monotonic() + options.seconds, options.dtype, options.lr, peak, stamp(device, options.commit),
            options.profile,
        )  # fmt: skip
        given = World(options.base, options.data, ModelConfig.load(options.base)) if options.base else None
        rows = csv_file.CsvFile(options.out / "train_step.csv", COLUMNS)
        return 0 if run(chosen(options), session, given, rows) else 1


def chosen(options: argparse.Namespace) -> list[list[Case]]:
    """The axes of scaling, the user's own case, or those of the phases."""
    if options.scaling:
        return step_cases.scaling(quick=options.quick)
    if options.base:
        names = tuple(options.implementation or PEERS)
        is_compiled = options.device == "cpu" and not options.quick and has_compiler()
        told = ("--train.kernels=compiled",) if is_compiled else ()  # "auto" takes them for a run that lasts
        return [[Case(options.base.name, options.token_budget, options.bins_per_step, names, told)]]
    table = QUICK if options.quick else PHASES
    chosen = [case for phase in options.phase or ("ours", "peers") for case in table[phase]]
    has_winners = options.winners and options.winners.is_file()
    winners = json.loads(options.winners.read_text("utf-8")) if has_winners else {}
    return [[with_attention(case, winners.get(case.model))] for case in chosen]


def with_attention(case: Case, name: str | None) -> Case:
    """The same with a backend of attention; None: what the run chooses."""
    return replace(case, options=(*case.options, f"--train.attention={name}")) if name else case


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line.parser("benchmarks.train_step", "times the whole step and its peers", "train_step.csv")
    parser.add_argument(
        "--phase", choices=list(PHASES), action="append", help="several may be given (default: ours and peers)"
    )
    parser.add_argument("--scaling", action="store_true", help="our own step over sizes, instead")
    parser.add_argument("--base", type=Path, help="a base model's folder, instead of the phases' models")
    parser.add_argument("--data", type=Path, help="a folder that `ochat prepare` wrote for this base")
    parser.add_argument("--token-budget", type=int, default=2048, help="of --base: tokens of a micro-batch of ours")
    parser.add_argument("--bins-per-step", type=int, default=2, help="of --base: micro-batches of a step")
    parser.add_argument("--implementation", choices=list(RUNNERS), action="append", help="of --base (default: all)")
    parser.add_argument("--lr", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--dtype", choices=list(LOSS_BOUND), default="bfloat16", help="of the computation")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 5; of a dry run 1)")
    parser.add_argument("--steps", type=int, help="steps of a round (default: 4; of a dry run 10)")
    parser.add_argument("--warmup", type=int, help="steps before them (default: those of a round)")
    parser.add_argument("--profile", action="store_true", help="one more step of ours: kernels.csv")
    parser.add_argument("--winners", type=Path, help="a JSON file, if it is there: model -> its backend of attention")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a process")
    why_quick = "--scaling, or --base and --data: the phases' models are for a GPU"
    options = command_line.parse(parser, arguments, why_quick, "base", "data", "scaling")
    if (options.base is None) != (options.data is None):
        parser.error("--base and --data come together")
    if options.quick:
        options.threads, options.dtype = 1, "float32"
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.steps = options.steps or (10 if options.quick else 4)
    options.warmup = options.warmup or options.steps
    return options


if __name__ == "__main__":
    sys.exit(main())
