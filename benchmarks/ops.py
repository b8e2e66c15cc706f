"""Times every operator against its definition and its peers: rows of a CSV, the most wanted first.

    PYTHONPATH=.:kernels python -m benchmarks.ops --out DIR [--phase ours|peers|rest] [--device cpu --quick]
`--device cpu --quick` runs the same path on tiny shapes in Triton's interpreter; its times say nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

if __name__ == "__main__" and re.search(r"--device[ =]cpu\b", " ".join(sys.argv)):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

import torch
from torch import Tensor

from benchmarks import bench, command_line, implementations
from benchmarks.bench import Ceilings
from benchmarks.cases import MODELS, OPERATORS, OPTIMIZER_VARIANTS, Case, Model, Problem, cost, make_problem
from benchmarks.cases import with_vocabulary as with_head
from benchmarks.implementations import Implementation, outputs_of

T = 16384
FRACTIONS = [1.0, 0.75, 0.5, 0.25]
PHASES = ["ours", "peers", "rest"]
TINY = Model("tiny", H=64, F=96, N=4, K=2, D=16, V=257, L=1)
COLUMNS = [
    *("date", "commit", "device", "torch", "triton", "driver", "group", "operator", "model", "variant"),
    *("T", "H", "F", "N", "K", "D", "V", "supervised", "implementation", "pass", "status", "note"),
    *("repeats", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "tflop_per_s", "gb_per_s"),
    *("ceiling_tflop_per_s", "ceiling_gb_per_s", "floor_ms", "floor_fraction", "peak_gib", "max_error"),
]
SECONDS_PER_PASS = 1.5  # of measuring, all implementations of a group together
MOST_REPEATS, FEWEST_REPEATS = 60, 5
READY_SECONDS = 45.0  # for an implementation to compile and run once
CACHES_BETWEEN_USES = 4  # the memory touched between two uses of one input, in sizes of the L2 cache


class Group(NamedTuple):
    """Implementations that take turns on one case; None stands for all of them."""

    case: Case
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class Session:
    """What all groups of a run share."""

    device: torch.device
    ceilings: Ceilings
    stamp: dict[str, str]
    deadline: float  # of time.monotonic
    quick: bool

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def time_to_get_ready(self) -> AbstractContextManager[None]:
        return bench.time_limit(min(READY_SECONDS, max(self.seconds_left(), 1.0)))


def groups(phase: str, *, quick: bool) -> list[Group]:
    """`ours`: one model, our kernels and the definition; `peers`: the same cases, everyone; `rest`: the other shapes,
    the compiler last, because it takes longest to get ready."""
    if quick:
        return _quick_groups(phase)
    wanted = _cases(MODELS["Llama-3-8B"], FRACTIONS, OPTIMIZER_VARIANTS)
    if phase != "rest":
        return [Group(case, implementations.OURS if phase == "ours" else None) for case in wanted]
    rest = [case for name in list(MODELS)[1:] for case in _cases(MODELS[name], [1.0, 0.5], ["bf16"])]
    heads = [with_head(MODELS["Llama-2-7B"], 32002), with_head(MODELS["Llama-3-8B"], 128257)]
    rest += [Case("linear_cross_entropy", model, T, fraction) for model in heads for fraction in (1.0, 0.5)]
    rest.sort(key=lambda case: case.supervised, reverse=True)
    eager = [Group(case, _all_but("compiled", case.operator)) for case in rest]
    return eager + [Group(case, ("triton", "compiled")) for case in rest if case.supervised == 1]


def _quick_groups(phase: str) -> list[Group]:
    """Every operator and everyone once; the interpreter is slow, so our kernels meet others only in the last."""
    cases = _cases(TINY, [1.0, 0.5], OPTIMIZER_VARIANTS)
    cases = [dataclasses.replace(case, num_tokens=8) for case in cases]
    if phase == "ours":
        return [Group(case, implementations.OURS) for case in cases]
    if phase == "peers":
        return [Group(case, _all_but("triton", case.operator)) for case in cases if case.variant in ("", "fp32")]
    return [Group(case, None) for case in cases if case.operator == "swiglu"]


def _all_but(name: str, operator: str) -> tuple[str, ...]:
    return tuple(each.name for each in implementations.of(operator) if each.name != name)


def _cases(model: Model, fractions: list[float], variants: list[str]) -> list[Case]:
    """The head first, then what is bound by memory, the head's other supervised fractions, the optimizer."""
    cases = [Case(operator, model, T) for operator in OPERATORS if operator != "adamw"]
    cases += [Case("linear_cross_entropy", model, T, fraction) for fraction in fractions[1:]]
    return cases + [Case("adamw", model, T, variant=variant) for variant in variants]


def run(phase: str, session: Session, rows: bench.Rows) -> bool:
    """Measures the phase's groups until the deadline; returns whether all of ours ran."""
    is_good = True
    for index, group in enumerate(groups(phase, quick=session.quick)):
        print(f"{phase} {index}: {group.case.operator}, {group.case.title}", flush=True)
        for row in measure(group, session):
            row |= {"group": f"{phase}-{index}"}
            rows.add(session.stamp | row)
            is_good &= row["status"] != "failed" or row["implementation"] not in implementations.OURS
            print("   ", _line(row), flush=True)
    return is_good


def measure(group: Group, session: Session) -> Iterator[dict[str, Any]]:
    """The rows of one group: those that can't run as they are met, then the measured ones, pass by pass."""
    case = group.case
    chosen = [each for each in implementations.of(case.operator) if group.names is None or each.name in group.names]
    if session.seconds_left() <= 0:
        yield from _excused(case, chosen, case.passes, "skipped", "the time was out")
        return
    expected = _expected(case, session.device)
    ready: dict[str, tuple[Implementation, implementations.Function, float]] = {}
    for each in chosen:
        try:
            with session.time_to_get_ready():
                function = each.load()
                got = _results(function, make_problem(case, session.device, 0))
                error = bench.max_error(got, expected) if expected else math.nan
            ready[each.name] = (each, function, error)
        except Exception as problem:
            yield from _excused(case, [each], case.passes, "failed", bench.reason(problem))
            bench.check_alive(session.device)
    del expected
    problems = _rotation(case, session.device)
    for which in case.passes:
        yield from _measure_pass(case, which, ready, problems, session)
    bench.free(session.device)


def _measure_pass(case: Case, which: str, ready: dict, problems: list[Problem], session: Session) -> Iterator[dict]:
    calls, peaks, estimate_ms = {}, {}, 0.0
    for name, (each, function, _) in ready.items():
        call = _rotating(function, which, problems)
        try:
            with session.time_to_get_ready():
                call()  # some compile for each pass, or tune
                peaks[name] = bench.peak_gib(call, session.device)
                estimate_ms += bench.interleaved({name: call}, 1, session.device)[name][0]
            calls[name] = call
        except Exception as problem:
            yield from _excused(case, [each], [which], "failed", bench.reason(problem))
            bench.check_alive(session.device)
    repeats = 2 if session.quick else _repeats(estimate_ms)
    marks = bench.interleaved(calls, repeats, session.device)
    for name in calls:
        each, _, error = ready[name]
        row = _measured(case, which, marks[name], session.ceilings)
        status = "ok" if each.is_weighted else "unweighted"
        yield row | {"implementation": name, "status": status, "peak_gib": peaks[name], "max_error": error}


def _repeats(estimate_ms: float) -> int:
    """As many turns as fit the time of a pass, within bounds; the lead of each call counts."""
    turn_ms = estimate_ms + 2.0
    return int(min(max(SECONDS_PER_PASS * 1e3 / turn_ms, FEWEST_REPEATS), MOST_REPEATS))


def _measured(case: Case, which: str, marks_ms: list[float], ceilings: Ceilings) -> dict[str, Any]:
    """Times, rates and what is left to the floor; the rate is the one of what bounds the operator."""
    flops, num_bytes = cost(case, which)
    median_ms = bench.percentile(marks_ms, 50)
    floor_ms = ceilings.floor_ms(flops, num_bytes)
    return _shape(case, which) | {
        "repeats": len(marks_ms),
        "median_ms": median_ms,
        "p20_ms": bench.percentile(marks_ms, 20),
        "p80_ms": bench.percentile(marks_ms, 80),
        "flops": flops or None,
        "bytes": num_bytes,
        "tflop_per_s": flops / median_ms / 1e9 if flops else None,
        "gb_per_s": None if flops else num_bytes / median_ms / 1e6,
        "ceiling_tflop_per_s": ceilings.tflop_per_s,
        "ceiling_gb_per_s": ceilings.gb_per_s,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / median_ms,
    }


def _shape(case: Case, which: str) -> dict[str, Any]:
    letters = {letter: getattr(case.model, letter) for letter in "HFNKDV"}
    names = {"operator": case.operator, "model": case.model.name, "variant": case.variant}
    return names | letters | {"T": case.num_tokens, "supervised": case.supervised, "pass": which}


def _excused(case: Case, whom: list[Implementation], passes: list[str], status: str, note: str) -> Iterator[dict]:
    """Rows that say why there is no number."""
    for each in whom:
        for which in passes:
            yield _shape(case, which) | {"implementation": each.name, "status": status, "note": note}


def _expected(case: Case, device: torch.device) -> list[Tensor]:
    """What the definition gives for the inputs of seed 0; nothing where it fails, which its own row will say."""
    definition = next(each for each in implementations.of(case.operator) if each.name == "reference")
    try:
        return _results(definition.load(), make_problem(case, device, 0))
    except Exception as problem:
        print(f"    nothing to compare with: {bench.reason(problem)}", flush=True)
        bench.check_alive(device)
        return []


def _results(function: implementations.Function, problem: Problem) -> list[Tensor]:
    """Outputs and gradients of one call; of an operator that works in place, what it left."""
    outputs = outputs_of(function(problem.arguments))
    if not problem.wanted:
        in_place = ("params", "exp_avgs", "exp_avg_sqs")
        return [x for name in in_place for x in problem.arguments.get(name, [])]
    leaves = [problem.arguments[name] for name in problem.wanted]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, problem.upstream))


def _rotation(case: Case, device: torch.device) -> list[Problem]:
    """Enough sets of inputs that none is still in the cache when its turn comes again."""
    problems = [make_problem(case, device, 1)]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**12
    needed = math.ceil(CACHES_BETWEEN_USES * cache / problems[0].num_bytes())
    return problems + [make_problem(case, device, 1 + i) for i in range(1, min(needed, 64))]


_uses = 0  # of any set by anyone: neighbours in time must not share one


def _rotating(function: implementations.Function, which: str, problems: list[Problem]) -> Callable[[], None]:
    """One pass over the next set of inputs, its results dropped."""
    plain = [problem.detached() for problem in problems]

    def call() -> None:
        global _uses
        _uses += 1
        index = _uses % len(problems)
        if which == "forward+backward":
            _results(function, problems[index])
            return
        with torch.no_grad():
            function(plain[index])

    return call


def _line(row: dict[str, Any]) -> str:
    who = f"{row['implementation']:<10} {row['pass']:<16}"
    if "median_ms" not in row:
        return f"{who} {row['status']}: {row['note']}"
    return f"{who} {row['median_ms']:9.3f} ms  {row['floor_fraction']:6.1%} of the floor  error {row['max_error']:.1e}"


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.ops", "times the operators", "ops.csv")
    parser.add_argument("--phase", choices=PHASES, action="append", help="several may be given (default: all)")
    options = command_line.parse(parser, arguments, "the interpreter would need days for real shapes")
    device, deadline = torch.device(options.device), time.monotonic() + options.seconds
    ceilings = bench.measure_ceilings(device, quick=options.quick)
    print(f"ceilings: {ceilings.tflop_per_s:.4g} TFLOP/s, {ceilings.gb_per_s:.4g} GB/s", flush=True)
    session = Session(device, ceilings, bench.stamp(device, options.commit), deadline, options.quick)
    rows = bench.Rows(options.out / "ops.csv", COLUMNS)
    is_good = True
    for phase in options.phase or PHASES:
        is_good &= run(phase, session, rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
