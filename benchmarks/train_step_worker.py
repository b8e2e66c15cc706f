"""One implementation in processes of its own, so that memory and caches are its own: both ends of the pipe.

    worker = Worker(spec, Path("log.txt")); worker.ready(60.0); worker.run(4, 60.0)
    echo 4 | python -m benchmarks.train_step_worker '{"implementation": "ours", "config": "run.toml", "device": "cpu"}'
The second is what the first starts: a line asks for so many steps, and a line of JSON answers with what they took.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench
from benchmarks.train_step_peers import Counts, Ours, Packed, Padded, Peer, Transformers
from benchmarks.train_step_unweighted import Liger, Trl
from ochat import config as configuration
from ochat.distributed import processes as processes_module
from ochat.train.metrics import peak_memory_gib

ROOT = Path(__file__).parent.parent
RUNNERS: dict[str, type[Ours] | type[Transformers]] = {
    "ours": Ours, "padded": Padded, "packed": Packed, "liger": Liger, "trl": Trl,
}  # fmt: skip
WEIGHTED = ("ours", "padded", "packed")  # who trains on the records' weights, and so the same thing


class WorkerFailed(Exception):
    """The implementation's process ended, or gave no answer in time; the reason."""


class Worker:
    """An implementation on `processes` processes. `spec`: implementation, config, options, device, threads, peer,
    num_steps; `log`: where everything that is printed goes."""

    def __init__(self, spec: dict[str, Any], log: Path, processes: int = 1) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step_worker", json.dumps(spec)]
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
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # its answer says why
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
        answers = self._answers(seconds)
        most = {name: max(answer[name] for answer in answers) for name in ("seconds", "peak_gib")}
        totals = {name: sum(answer[name] for answer in answers) for name in ("cpu_seconds", *Counts._fields)}
        return most | totals | {"losses": answers[0]["losses"]}

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

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
    """This checkout on the path, the threads, and the rank as torchrun tells it."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    known = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": spec["threads"]} | ranks
    allocator = {
        processes_module.ALLOCATOR[0]: "expandable_segments:True"
    }  # what ours sets for itself, its peers have too
    return allocator | os.environ | {name: str(value) for name, value in known.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    spec = json.loads(sys.argv[1])
    device = torch.device(spec["device"])
    try:
        config = configuration.load(spec["config"], spec["options"])
        runner = RUNNERS[spec["implementation"]](config, device, Peer(**spec["peer"]))
        if runner.loader.num_steps < spec["num_steps"]:
            raise ValueError(f"the data make {runner.loader.num_steps} steps of the {spec['num_steps']} wanted")
        answers.write(json.dumps({"ready": runner.note}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(measure(runner, int(line), device)) + "\n")
    except Exception as problem:
        text = str(problem).strip().split("\n")[0]
        answers.write(json.dumps({"failed": f"{type(problem).__name__}: {text}"[:300]}) + "\n")
        raise


def measure(runner: Any, steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of so many steps on end, what they computed on, and their losses."""
    reset_peak_memory(device)
    bench.synchronize(device)
    before, busy = time.perf_counter(), time.process_time()
    counts = [runner.step() for _ in range(steps)]
    bench.synchronize(device)
    taken = {"seconds": time.perf_counter() - before, "cpu_seconds": time.process_time() - busy}
    totals = Counts(*map(sum, zip(*counts, strict=True)))._asdict()
    return taken | totals | {"peak_gib": peak_memory_gib(device), "losses": runner.losses()}


def reset_peak_memory(device: torch.device) -> None:
    """Forgets what building the model took, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # Linux: the resident peak starts anew; elsewhere it includes loading
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
