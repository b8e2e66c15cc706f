"""Each implementation in processes of its own, which run rounds of steps in turn; the rates that follow.

    taken = take_turns([Start("ours", case, world, folder)], session); rates(taken[0].answers[1:], session, world.model)
    echo 4 | python -m benchmarks.step_worker '{"implementation": "ours", "config": "run.toml", "device": "cpu", ...}'
The second line is what the first starts: each line of input asks for so many steps, or for the kernels of one ("0"); a
line of JSON answers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import bare_world, step_cases, step_profile, timing
from benchmarks.csv_file import spread
from benchmarks.step_cases import Case, Peer, World
from benchmarks.step_peers import RUNNERS, Counts
from ochat import config as configuration
from ochat.distributed import processes as processes_module
from ochat.model.config import ModelConfig
from ochat.train.metrics import peak_memory_gib

ROOT = Path(__file__).parent.parent
READY_SECONDS = 240.0  # to load and compile


class WorkerFailed(Exception):
    """The implementation's process ended, or gave no answer in time; the reason."""


class Worker:
    """An implementation on `processes` processes. `spec`: implementation, config, options, device, threads, peer,
    num_steps, draws (whether the base has no weights); `log`: where everything that is printed goes."""

    def __init__(self, spec: dict[str, Any], log: Path, processes: int = 1) -> None:
        command = [sys.executable, "-m", "benchmarks.step_worker", json.dumps(spec)]
        port = free_port()
        self.log = log
        with log.open("w") as file:
            self.processes = [
                subprocess.Popen(
                    command, cwd=ROOT, env=environment(spec, rank, processes, port), text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file,
                )
                for rank in range(processes)
            ]  # fmt: skip

    def ready(self, seconds: float) -> str:
        """Waits until it is built; what it says of itself."""
        return self._answers(seconds)[0]["ready"]

    def run(self, steps: int, seconds: float) -> dict[str, Any]:
        """So many steps on end: seconds and peak_gib of the slowest and largest process, the losses, and processor
        seconds and Counts of all together. Raises WorkerFailed."""
        answers = self._ask(steps, seconds)
        most = {name: max(answer[name] for answer in answers) for name in ("seconds", "peak_gib")}
        totals = {name: sum(answer[name] for answer in answers) for name in ("cpu_seconds", *Counts._fields)}
        return most | totals | {"losses": answers[0]["losses"]}

    def profile(self, seconds: float) -> dict[str, Any]:
        """One more step: what it `ran` on the first process, as step_profile.Ran, and its `square_lengths`."""
        return self._ask(0, seconds)[0]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def _ask(self, steps: int, seconds: float) -> list[dict[str, Any]]:
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer says why
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
        return self._answers(seconds)

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        end = time.monotonic() + seconds
        return [self._answer(process, end - time.monotonic()) for process in self.processes]

    def _answer(self, process: subprocess.Popen, seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        timeout = None if math.isinf(seconds) else max(seconds, 0.0)
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise WorkerFailed("the time was out")
        line = process.stdout.readline()
        if not line:
            raise WorkerFailed(f"exit status {process.wait()}; see {self.log}")
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer


def environment(spec: dict[str, Any], rank: int, processes: int, port: int) -> dict[str, str]:
    """This checkout on the path, the threads, and the rank as torchrun sets it."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    known = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": spec["threads"]} | ranks
    allocator = {processes_module.ALLOCATOR[0]: "expandable_segments:True"}  # ours sets it; so do its peers
    return allocator | os.environ | {name: str(value) for name, value in known.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Session:
    """What all cases of a run share."""

    device: torch.device
    folder: Path  # for bases, data, runs and logs
    out: Path  # of results
    rounds: int
    steps: int  # of a round
    warmup: int  # steps before the first
    threads: int  # of a process
    deadline: float  # of time.monotonic
    dtype: str
    lr: float
    peak_flops: float
    stamp: dict[str, Any]
    profiles: bool = False  # one more step of ours

    @property
    def num_steps(self) -> int:
        """Of a process: those that warm up, then the timed ones."""
        return self.warmup + self.steps * self.rounds + self.profiles

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


class Start(NamedTuple):
    """An implementation to start on a case."""

    name: str  # of RUNNERS
    case: Case
    world: World
    folder: Path  # an empty one for its run and its log


@dataclass
class Taken:
    """What a worker reported: its note, an answer for each round, what ended it early, and the answer to profile."""

    note: str
    answers: list[dict[str, Any]]
    failure: str = ""
    profile: dict[str, Any] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there is a round after the warm-up."""
        return len(self.answers) > 1


def take_turns(starts: list[Start], session: Session) -> list[Taken]:
    """Start all, then let each run a round in turn. One that fails or exceeds the time keeps the rounds it has."""
    workers: list[Worker] = []
    taken = [Taken("", []) for _ in starts]
    try:
        workers.extend(start(each, session) for each in starts)
        for worker, result in zip(workers, taken, strict=True):
            try:
                result.note = worker.ready(min(READY_SECONDS, session.seconds_left()))
            except WorkerFailed as problem:
                result.failure = str(problem)
        for steps in (session.warmup, *[session.steps] * session.rounds):
            for worker, result in zip(workers, taken, strict=True):
                _one_round(worker, result, steps, session)
        for who, worker, result in zip(starts, workers, taken, strict=True):
            if session.profiles and who.name == "ours" and not result.failure:
                with contextlib.suppress(WorkerFailed):  # the times are there
                    result.profile = worker.profile(session.seconds_left())
    finally:
        for worker in workers:
            worker.close()
    return taken


def _one_round(worker: Worker, result: Taken, steps: int, session: Session) -> None:
    if result.failure:
        return worker.close()  # frees its memory for the others
    try:
        result.answers.append(worker.run(steps, session.seconds_left()))
    except WorkerFailed as problem:
        result.failure = str(problem)


def start(who: Start, session: Session) -> Worker:
    """The implementation's process or processes, still loading."""
    who.folder.mkdir(parents=True)
    config = who.folder / "run.toml"
    config.touch()
    settings = {
        "base.path": who.world.base, "data.path": who.world.data, "run.dir": who.folder / "run",
        "data.max_steps": session.num_steps, "optim.lr": session.lr, "train.dtype": session.dtype,
        "train.device": session.device.type, "train.peak_tflops": 1.0,
    }  # fmt: skip
    spec = {
        "implementation": who.name, "config": str(config), "device": session.device.type,
        "options": [*step_cases.options(who.case, settings), *who.world.options], "num_steps": session.num_steps,
        "threads": 1 if who.case.processes > 1 else session.threads, "peer": asdict(who.case.peer),
        "draws": not who.world.has_weights,
    }  # fmt: skip
    return Worker(spec, who.folder / "log.txt", who.case.processes)


def rates(rounds: list[dict[str, Any]], session: Session, model: ModelConfig) -> dict[str, Any]:
    """Medians and spread over rounds. MFU: the model's FLOPs on real tokens, the head's for supervised ones only, over
    the peak. cpu_s: processor seconds of a step, which other work on the machine disturbs less."""
    flops = [model.flops_per_step(r["tokens"], r["square_lengths"], r["supervised"]) / r["seconds"] for r in rounds]
    return {
        **spread([each["seconds"] / session.steps for each in rounds], "step_s"),
        "cpu_s": statistics.median([each["cpu_seconds"] / session.steps for each in rounds]),
        **spread([each["tokens"] / each["seconds"] for each in rounds], "tokens_per_s"),
        "supervised_tokens_per_s": statistics.median([each["supervised"] / each["seconds"] for each in rounds]),
        "padded_tokens_per_s": statistics.median([each["padded"] / each["seconds"] for each in rounds]),
        "mfu": statistics.median(flops) / session.peak_flops,
        "peak_gib": max(each["peak_gib"] for each in rounds),
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    spec = json.loads(sys.argv[1])
    device = torch.device(spec["device"])
    try:
        config = configuration.load(spec["config"], spec["options"])
        with bare_world.weights_are(bare_world.drawn) if spec["draws"] else contextlib.nullcontext():
            runner = RUNNERS[spec["implementation"]](config, device, Peer(**spec["peer"]))
        if runner.loader.num_steps < spec["num_steps"]:
            raise ValueError(f"the data make {runner.loader.num_steps} steps of the {spec['num_steps']} wanted")
        answers.write(json.dumps({"ready": runner.note}) + "\n")
        for line in sys.stdin:
            answer = measure(runner, int(line), device) if int(line) else profile(runner, device)
            answers.write(json.dumps(answer) + "\n")
    except Exception as problem:
        text = str(problem).strip().split("\n")[0]
        answers.write(json.dumps({"failed": f"{type(problem).__name__}: {text}"[:300]}) + "\n")
        raise


def measure(runner: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of so many steps on end, what they computed on, and their losses."""
    reset_peak_memory(device)
    timing.synchronize(device)
    before, busy = time.perf_counter(), time.process_time()
    counts = [runner.step() for _ in range(steps)]
    timing.synchronize(device)
    taken = {"seconds": time.perf_counter() - before, "cpu_seconds": time.process_time() - busy}
    totals = Counts(*map(sum, zip(*counts, strict=True)))._asdict()
    return taken | totals | {"peak_gib": peak_memory_gib(device), "losses": runner.losses()}


def profile(runner: Any, device: torch.device) -> dict[str, Any]:
    """What one step runs, and the sum of its squared lengths."""
    counts = []
    ran = step_profile.profiled(lambda: counts.append(runner.step()), device)
    return {"ran": ran, "square_lengths": counts[0].square_lengths}


def reset_peak_memory(device: torch.device) -> None:
    """Forgets what building the model took, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux: the resident peak starts anew; elsewhere it includes loading
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
