"""Everything that needs a GPU, in one command of seven minutes: whole steps, kernels, tests; a digest comes last.

    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite --out DIR [--phases NAME ...]   # dry run: --device cpu --quick
Each phase is a process that is killed, with all it started, when its time is over; time that one leaves, the next have.
What was measured until then is in DIR. A failure is a line of the digest and exit status 1. Nothing is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks import command_line, digest

ROOT = Path(__file__).parent.parent
SECONDS, SECONDS_AGAIN = 420.0, 240.0  # of all phases, and of those that were named
LAST_SECONDS = 4.0  # for the digest
MEASURING = 0.8  # of a phase's time: what begins later is skipped, so that little is killed
LOG, TESTS = "log.txt", "tests.txt"
MOST_LOGGED = 8 * 2**20  # bytes of a file
PROCESSES = 8  # of tests, which are mostly Triton compiling


class Phase(NamedTuple):
    """One program of the suite."""

    name: str
    seconds: float
    command: list[str]
    log: str = LOG


def phases(options: argparse.Namespace) -> list[Phase]:
    """The most important first; together they take SECONDS at most."""
    winners = ["--winners", str(options.out / digest.WINNERS)]
    return [
        Phase("smoke", 30, _program(options, "smoke")),
        Phase(
            "step", 70, _program(options, "train_step", "first", "--warmup=3", "--rounds=4", "--steps=2", "--profile")
        ),
        Phase("products", 25, _program(options, "products")),
        Phase("attention", 50, _program(options, "ops", "attention")),
        Phase(
            "chosen", 75, _program(options, "train_step", "chosen", "--warmup=3", "--rounds=4", "--steps=2", *winners)
        ),
        Phase("operators", 55, _program(options, "ops", "ours", "--phase=rest")),
        Phase("tests", 60, _tests(options), TESTS),
        Phase("peers", 16, _program(options, "ops", "peers")),
        Phase("peers' step", 35, _program(options, "train_step", "peers")),
    ]


def _program(options: argparse.Namespace, name: str, phase: str | None = None, *more: str) -> list[str]:
    command = [sys.executable, "-m", f"benchmarks.{name}", f"--out={options.out}", f"--device={options.device}"]
    command += [f"--phase={phase}"] if phase else []
    command += ["--quick"] if options.quick else []
    return [*command, *more, *([f"--commit={options.commit}"] if options.commit else [])]


def _tests(options: argparse.Namespace) -> list[str]:
    """What needs a GPU, the head, rounding, then other laws. Files are named: pytest sorts those of a folder."""
    first = [f"tests/{name}.py" for name in ("kernels/test_gpu", "laws/test_cuda")]
    first += [f"tests/kernels/test_{name}.py" for name in ("linear_cross_entropy", "rounding")]
    laws = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/test_*.py"))
    chosen = [*first, *(x for x in laws if x not in first and "compiled" not in x), "tests/model/test_attention.py"]
    command = [sys.executable, "-m", "pytest", *chosen, "-v", "--tb=short", "-p", "no:cacheprovider", "--timeout=60"]
    command += ["--continue-on-collection-errors"]  # else a file that lacks a package ends the phase
    if options.quick:
        return [*command, "-k", "refuses"]
    return [*command, *(["-n", str(PROCESSES)] if find_spec("xdist") else [])]


def run(phase: Phase, until: float, options: argparse.Namespace) -> str:
    """Run one phase until a time of time.monotonic; "passed", or what went wrong."""
    before = time.monotonic()
    limit = until - before
    if limit < 5:
        return "skipped: the time was out"
    measures = phase.log == LOG
    command = [*phase.command, *([f"--seconds={limit * MEASURING:.0f}"] if measures else [])]
    print(f"\n== {phase.name} (at most {limit:.0f} s): {' '.join(command[1:])}", flush=True)
    status = watch(command, options.out / phase.log, limit, environment(options.device))
    taken = f"{time.monotonic() - before:.0f} s"
    if status is None:
        return f"killed after {taken}"
    return f"passed ({taken})" if status in (0, 5) else f"failed: exit status {status} ({taken})"  # 5: no tests


def watch(command: list[str], log: Path, limit: float, variables: dict[str, str]) -> int | None:
    """The exit status, None where it had to be killed; what it prints is shown and kept, line by line."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with log.open("a", encoding="utf-8") as file:
        reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers that it started and left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(5)


def _copy(lines: IO[str], file: IO[str]) -> None:
    for line in lines:
        print(line, end="", flush=True)
        if file.tell() < MOST_LOGGED:
            file.write(line)
            file.flush()


def environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known = inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    return known | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def main() -> int:
    parser = command_line.parser("benchmarks.gpu_suite", "whole steps, times of kernels, tests", "all results")
    parser.add_argument("--phases", nargs="+", metavar="NAME", help="only these, in the suite's order")
    parser.set_defaults(seconds=None)
    options = parser.parse_args()
    options.seconds = options.seconds or (SECONDS_AGAIN if options.phases else SECONDS)
    options.out = options.out.resolve()
    every = phases(options)
    if unknown := set(options.phases or ()) - {phase.name for phase in every}:
        parser.error(f"no phase {', '.join(unknown)}; there are {', '.join(phase.name for phase in every)}")
    options.out.mkdir(parents=True, exist_ok=True)
    start, outcomes, planned = time.monotonic(), {}, 0.0
    for phase in every:
        if options.phases and phase.name not in options.phases:
            continue
        planned += phase.seconds
        until = start + min(planned, options.seconds - LAST_SECONDS)
        outcomes[phase.name] = run(phase, until, options)
        if phase.name == "attention":
            digest.write_winners(options.out)
    lines = digest.lines(options.out, outcomes, options.out / TESTS)
    print("", *lines, sep="\n")
    with (options.out / LOG).open("a", encoding="utf-8") as file:
        print("", *lines, sep="\n", file=file)
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
