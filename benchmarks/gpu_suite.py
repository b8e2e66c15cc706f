"""Everything that needs a GPU, in one command of less than nine minutes: tests, times of kernels and of whole steps.

    PYTHONPATH=.:kernels python -m benchmarks.gpu_suite --out DIR       # dry run: --device cpu --quick
It continues after a failure, reports it at the end (exit status 1), and fetches nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks import command_line, csv_file, report

ROOT = Path(__file__).parent.parent
SECONDS = 520.0
TEST_SHARE = 0.25  # of the time, at most, for each of the two test runs
OUR_STEP_SHARE = 0.65  # of what is left after our kernels
PEERS_SHARE, PEER_STEPS_SHARE = 0.4, 0.7  # of what is left when each begins: other shapes come after them
LAST_SECONDS = 4.0  # for tables
ATTENTION_SECONDS = 28.0  # of measuring; with its start less than 40
GRACE_SECONDS = 45.0  # a group that has begun is measured to its end
PROCESSES = 8  # of tests that are mostly Triton compiling


class Step(NamedTuple):
    """One program of the suite."""

    name: str
    command: list[str]
    log: Path | None  # a file that its output goes to, too
    share: float  # of the time that is left
    most: float = math.inf  # seconds


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """The most important first."""
    log = options.out / "tests.txt"
    tests = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "--timeout=120", "-p", "no:cacheprovider"]
    on_gpu = ["tests/kernels", "tests/model/test_attention.py", "tests/laws/test_cuda.py"]
    yield Step("tests on the GPU", [*tests, "-m", "gpu", *on_gpu], log, TEST_SHARE)
    yield Step("attention", _command(options, "ops", "attention"), None, 1.0, ATTENTION_SECONDS)
    laws = [*tests, "-m", "not gpu", "tests/kernels", "--ignore=tests/kernels/test_compiled.py"]
    if options.quick:
        laws += ["-k", "refuses"]
    elif find_spec("xdist"):
        laws += ["-n", str(PROCESSES)]
    yield Step("laws of the kernels", laws, log, TEST_SHARE)
    yield Step("times: ours", _command(options, "ops", "ours"), None, 1.0)
    yield Step("step: ours", _command(options, "train_step", "ours"), None, OUR_STEP_SHARE)
    yield Step("times: peers", _command(options, "ops", "peers"), None, PEERS_SHARE)
    yield Step("step: peers", _command(options, "train_step", "peers"), None, PEER_STEPS_SHARE)
    yield Step("times: rest", _command(options, "ops", "rest"), None, 1.0)


def _command(options: argparse.Namespace, program: str, phase: str | None = None) -> list[str]:
    command = [sys.executable, "-m", f"benchmarks.{program}", "--out", str(options.out), "--device", options.device]
    command += ["--phase", phase] if phase else []
    command += ["--quick"] if options.quick else []
    return command + (["--commit", options.commit] if options.commit else [])


def run(step: Step, seconds_left: float, environment: dict[str, str]) -> str:
    """Run one step within its share of the time; return "passed", or what went wrong."""
    limit = min(seconds_left * step.share, step.most)
    if limit < 5:
        return "skipped: the time was out"
    command = step.command
    if step.log is None:
        command = [*command, "--seconds", str(round(limit, 1))]
        limit += min(GRACE_SECONDS, max(seconds_left - limit, 0.0) + GRACE_SECONDS / 3)
    print(f"\n== {step.name} (at most {limit:.0f} s): {' '.join(command[1:])}", flush=True)
    before = time.monotonic()
    status = _watch(command, step.log, limit, environment)
    outcome = {0: "passed", 5: "passed: nothing to run", None: f"stopped after {limit:.0f} s"}
    return f"{outcome.get(status, f'failed: exit status {status}')} ({time.monotonic() - before:.0f} s)"


def _watch(command: list[str], log: Path | None, limit: float, environment: dict[str, str]) -> int | None:
    """The exit status, None after the time limit; output is shown and logged line by line."""
    keep = f" 2>&1 | tee -a '{log}'" if log else " 2>&1"
    shell = ["bash", "-c", f'set -o pipefail; timeout --kill-after=5 {limit:.0f} "$@"{keep}', "bash", *command]
    status = subprocess.run(shell, cwd=ROOT, env=environment).returncode
    return None if status in (124, 137) else status


def _environment(options: argparse.Namespace) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known = inherited | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if options.device == "cpu":
        known |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return known


def finish(out: Path) -> None:
    """Tables of what was measured, on the screen and in files."""
    for name, table, write in (("train_step", "steps.txt", report.write_steps), ("ops", "report.txt", report.write)):
        if not (out / f"{name}.csv").exists():
            print(f"no times in {name}.csv")
            continue
        with (out / table).open("w", encoding="utf-8") as file:
            write(csv_file.read(out / f"{name}.csv"), file)
        print((out / table).read_text("utf-8"))


def main() -> int:
    parser = command_line.parser("benchmarks.gpu_suite", "tests, times of kernels and whole steps", "all results")
    parser.add_argument("--phases", nargs="+", metavar="NAME", help="only the phases whose names begin so")
    parser.set_defaults(seconds=SECONDS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds - LAST_SECONDS
    environment = _environment(options)
    chosen = [step for step in steps(options) if step.name.startswith(tuple(options.phases or [""]))]
    outcomes = {step.name: run(step, end - time.monotonic(), environment) for step in chosen}
    finish(options.out)
    print("", *(f"{name}: {outcome}" for name, outcome in outcomes.items()), sep="\n")
    print(f"to keep them: copy {options.out}/ops.csv to benchmarks/results/DEVICE-DATE.csv and train_step.csv to")
    print("benchmarks/results/train_step-DEVICE-DATE.csv, and commit them")
    return 0 if all(outcome.startswith("passed") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
