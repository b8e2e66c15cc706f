"""How our step's time grows: with T, with the documents' length, with the supervised share, with processes (gloo).

    python -m benchmarks.train_step --scaling --out DIR --device cpu    # train_step_scaling.csv; plots.py draws it

One axis changes at a time, on the small model of train_step_cases.py and equal documents; the points of an axis take
turns. Processes have one thread each; the time of a step is the slowest's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bench, train_step_cases
from benchmarks.train_step_cases import SHORTEST, Case
from benchmarks.train_step_rounds import Session, Start, Taken, rates, take_turns

COLUMNS = [
    *("date", "commit", "device", "cpu", "cores", "load", "python", "torch", "triton", "driver", "model"),
    *("axis", "value", "processes", "threads", "dtype", "tokens", "length", "supervised", "rounds", "steps_per_round"),
    *("step_s", "step_s_p20", "step_s_p80", "cpu_s", "tokens_per_s", "flops", "tflop_per_s", "peak_gib"),
]
MIDDLE = Case("small", 4096, 1, longest=256, lengths="equal")


class Point(NamedTuple):
    """One value of an axis."""

    axis: str
    value: float
    case: Case
    processes: int = 1


def axes(*, quick: bool) -> list[list[Point]]:
    """The points of each axis; quick: two of each, on the tiny model."""
    middle = dataclasses.replace(MIDDLE, model="tiny", token_budget=512, longest=128) if quick else MIDDLE

    def point(axis: str, value: float, processes: int = 1, **changes: Any) -> Point:
        return Point(axis, value, dataclasses.replace(middle, **changes), processes)

    every = [
        [point("T", T, token_budget=T) for T in (512, 1024, 2048, 4096, 8192)],
        [point("length", n, longest=n) for n in (SHORTEST, 256, 1024, 4096)],
        [point("supervised", share, supervised=share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)],
        [point("processes", n, n, token_budget=middle.token_budget // 4, bins_per_step=4) for n in (1, 2, 4)],
    ]
    return [points[:2] for points in every] if quick else every


def run(session: Session, out: Path, *, quick: bool) -> None:
    """Measures every axis; a row a point."""
    rows = bench.Rows(out / "train_step_scaling.csv", COLUMNS)
    for points in axes(quick=quick):
        for row in measure(points, session):
            rows.add({name: value for name, value in (session.stamp | row).items() if name in COLUMNS})
            text = f"{row['axis']:10} {row['value']:6g}  {row['step_s'] * 1e3:9.1f} ms a step"
            print(f"{text} ({row['step_s_p20'] * 1e3:.1f}-{row['step_s_p80'] * 1e3:.1f})", flush=True)


def measure(points: list[Point], session: Session) -> Iterator[dict[str, Any]]:
    """The rows of one axis."""
    if any(point.processes > 1 for point in points):
        session = dataclasses.replace(session, threads=1)
    starts = []
    for at, point in enumerate(points):
        folder = session.folder / f"{point.axis}-{at}"
        world = train_step_cases.make_world(point.case, folder / "world", session.device, session.num_steps)
        starts.append(Start("ours", point.case, world, folder / "run", point.processes))
    for point, who, taken in zip(points, starts, take_turns(starts, session), strict=True):
        if not taken.is_measured:
            raise RuntimeError(f"{point.axis} {point.value:g}: {taken.failure}")
        yield describe(point, who, taken, session)


def describe(point: Point, who: Start, taken: Taken, session: Session) -> dict[str, Any]:
    """A point as a row; FLOPs are the model's, of a step."""
    counts = taken.answers[-1]
    flops = who.world.model.flops_per_step(counts["tokens"], counts["square_lengths"], counts["supervised"])
    row = rates(taken.answers[1:], session, who.world.model)
    return row | {
        "model": point.case.model, "axis": point.axis, "value": point.value, "processes": point.processes,
        "threads": session.threads, "dtype": session.dtype, "tokens": counts["tokens"] / session.steps,
        "length": point.case.longest, "supervised": counts["supervised"] / counts["tokens"],
        "rounds": len(taken.answers) - 1, "steps_per_round": session.steps, "flops": flops / session.steps,
        "tflop_per_s": row["mfu"] * session.peak_flops / 1e12, "load": os.getloadavg()[0],
    }  # fmt: skip
