"""Rounds of steps that processes take in turns, and the rates that follow from them.

taken = take_turns([Start("ours", case, world, folder)], session); rates(taken[0].answers[1:], session, world.model)
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import bench, train_step_cases
from benchmarks.train_step_cases import Case, World
from benchmarks.train_step_worker import Worker, WorkerFailed
from ochat.model.config import ModelConfig

READY_SECONDS = 240.0  # to load and compile


@dataclass(frozen=True)
class Session:
    """What all cases of a run share."""

    device: torch.device
    folder: Path  # for bases, data, runs and logs
    rounds: int
    steps: int  # of a round
    threads: int  # of a process
    deadline: float  # of time.monotonic
    dtype: str
    lr: float
    peak_flops: float
    stamp: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """Of a process: a round to warm up, then the timed ones."""
        return self.steps * (self.rounds + 1)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class Start(NamedTuple):
    """Who is started on what."""

    name: str  # of train_step_worker.RUNNERS
    case: Case
    world: World
    folder: Path  # an empty one for its run and its log
    processes: int = 1


@dataclass
class Taken:
    """What a worker said of itself, its answers, one a round, and what ended it early."""

    note: str
    answers: list[dict[str, Any]]
    failure: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether there is a round after the one that warms up."""
        return len(self.answers) > 1


def take_turns(starts: list[Start], session: Session) -> list[Taken]:
    """Everyone is started, then each runs a round in turn; who fails, or outlasts the time, keeps the rounds it has."""
    workers: list[Worker] = []
    taken = [Taken("", []) for _ in starts]
    try:
        workers.extend(start(each, session) for each in starts)
        for worker, result in zip(workers, taken, strict=True):
            try:
                result.note = worker.ready(min(READY_SECONDS, session.seconds_left()))
            except WorkerFailed as problem:
                result.failure = str(problem)
        for _ in range(session.rounds + 1):
            for worker, result in zip(workers, taken, strict=True):
                _one_round(worker, result, session)
    finally:
        for worker in workers:
            worker.close()
    return taken


def _one_round(worker: Worker, result: Taken, session: Session) -> None:
    if result.failure:
        return worker.close()  # its memory is the others' now
    try:
        result.answers.append(worker.run(session.steps, session.seconds_left()))
    except WorkerFailed as problem:
        result.failure = str(problem)


def start(who: Start, session: Session) -> Worker:
    """The implementation's process, or processes, on their way to being ready."""
    who.folder.mkdir(parents=True)
    config = who.folder / "run.toml"
    config.touch()
    settings = {
        "base.path": who.world.base, "data.path": who.world.data, "run.dir": who.folder / "run",
        "data.max_steps": session.num_steps, "optim.lr": session.lr, "train.dtype": session.dtype,
        "train.device": session.device.type, "train.peak_tflops": 1.0,
    }  # fmt: skip
    options = [*train_step_cases.options(who.case, settings), *who.world.options]
    spec = {
        "implementation": who.name, "config": str(config), "options": options,
        "device": session.device.type, "threads": session.threads, "num_steps": session.num_steps,
        "peer": asdict(who.case.peer),
    }  # fmt: skip
    return Worker(spec, who.folder / "log.txt", who.processes)


def rates(rounds: list[dict[str, Any]], session: Session, model: ModelConfig) -> dict[str, Any]:
    """Medians and spread over rounds. MFU: the model's FLOPs on real tokens, the head's for supervised ones only, over
    the peak, whatever was computed besides. cpu_s: the processors' own seconds of a step, which others on the machine
    disturb less."""
    flops = [model.flops_per_step(r["tokens"], r["square_lengths"], r["supervised"]) / r["seconds"] for r in rounds]
    return {
        **spread([each["seconds"] / session.steps for each in rounds], "step_s"),
        "cpu_s": bench.percentile([each["cpu_seconds"] / session.steps for each in rounds], 50),
        **spread([each["tokens"] / each["seconds"] for each in rounds], "tokens_per_s"),
        "supervised_tokens_per_s": bench.percentile([each["supervised"] / each["seconds"] for each in rounds], 50),
        "padded_tokens_per_s": bench.percentile([each["padded"] / each["seconds"] for each in rounds], 50),
        "mfu": bench.percentile(flops, 50) / session.peak_flops,
        "peak_gib": max(each["peak_gib"] for each in rounds),
    }


def spread(values: list[float], name: str) -> dict[str, float]:
    """Median, 20th and 80th percentile as columns."""
    p20, median, p80 = (bench.percentile(values, percent) for percent in (20, 50, 80))
    return {name: median, f"{name}_p20": p20, f"{name}_p80": p80}
