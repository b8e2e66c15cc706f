"""Time every operator against its definition and other packages: rows of ops.csv, the most important first.

    PYTHONPATH=.:kernels python -m benchmarks.ops --out DIR [--phase attention|ours|peers|rest] [--device cpu --quick]
Before it is timed, each implementation runs once and its error against the definition is taken. `--device cpu --quick`
runs the same path on tiny shapes in Triton's interpreter; its times mean nothing.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

if __name__ == "__main__" and re.search(r"--device[ =]cpu\b", " ".join(sys.argv)):
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything imports one

import torch
from torch import Tensor

from benchmarks import attention, cases, command_line, csv_file, implementations, smoke, timing
from benchmarks.cases import MODELS, OPERATORS, OPTIMIZER_VARIANTS, Case, Model, Problem
from benchmarks.implementations import Function, Implementation, outputs_of
from benchmarks.timing import Ceilings
from ochat.model.attention.backends import Needs
from ochat.model.attention.packed import default_backend
from ochat.model.attention.sdpa import Scores

T = 16384
FRACTIONS = [1.0, 0.75, 0.5, 0.25]
PHASES = ["attention", "ours", "peers", "rest"]
TINY = Model("tiny", H=64, F=96, N=4, K=2, D=16, V=257, L=1)
COLUMNS = [
    *("date", "commit", "device", "torch", "triton", "driver", "group", "operator", "model", "variant", "window"),
    *("T", "H", "F", "N", "K", "D", "V", "supervised", "implementation", "baseline", "pass", "status", "note"),
    *("repeats", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "tflop_per_s", "gb_per_s"),
    *("ceiling_tflop_per_s", "ceiling_gb_per_s", "floor_ms", "floor_fraction", "peak_gib", "max_error"),
]
SECONDS_PER_PASS, ATTENTION_SECONDS_PER_PASS = 1.5, 0.3  # of measuring, all implementations of a group together
MOST_REPEATS, FEWEST_REPEATS = 60, 5
READY_SECONDS = 45.0  # for an implementation to compile and run once
CACHES_BETWEEN_USES = 4  # the memory touched between two uses of one input, in sizes of the L2 cache
ROUNDING = 2**-8  # one bf16 rounding, of the largest element


class Group(NamedTuple):
    """Implementations that take turns on one case; None: all of them."""

    case: Case
    names: tuple[str, ...] | None = None


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
        return timing.time_limit(min(READY_SECONDS, max(self.seconds_left(), 1.0)))

    @property
    def attention_baseline(self) -> str:
        """The backend that the product takes on this device where none is measured."""
        return default_backend(self.device, Needs(torch.bfloat16, 128, Scores()))


def groups(phase: str, session: Session) -> list[Group]:
    """`attention`: its backends; `ours`: one model, our kernels and the definition; `peers`: the same cases, everyone;
    `rest`: the other shapes, compiled ones last, because they take longest to get ready."""
    if phase == "attention":
        return _attention_groups(session)
    if session.quick:
        return _quick_groups(phase)
    wanted = _cases(MODELS["Llama-3-8B"], FRACTIONS, OPTIMIZER_VARIANTS)
    if phase != "rest":
        return [Group(case, implementations.OURS if phase == "ours" else None) for case in wanted]
    rest = [case for name in list(MODELS)[1:] for case in _cases(MODELS[name], [1.0, 0.5], ["bf16"])]
    odd = [dataclasses.replace(MODELS[name], V=V) for name, V in (("Llama-2-7B", 32002), ("Llama-3-8B", 128257))]
    rest += [Case("linear_cross_entropy", model, T, fraction) for model in odd for fraction in (1.0, 0.5)]
    rest.sort(key=lambda case: case.supervised, reverse=True)
    eager = [Group(case, _all_but("compiled", case.operator)) for case in rest]
    return eager + [Group(case, ("triton", "compiled")) for case in rest if case.supervised == 1]


def _quick_groups(phase: str) -> list[Group]:
    """Every operator and everyone once; the interpreter is slow, so our kernels meet others only in the last phase."""
    tiny = [dataclasses.replace(case, num_tokens=8) for case in _cases(TINY, [1.0, 0.5], OPTIMIZER_VARIANTS)]
    if phase == "ours":
        return [Group(case, implementations.OURS) for case in tiny]
    if phase == "peers":
        return [Group(case, _all_but("triton", case.operator)) for case in tiny if case.variant in ("", "fp32")]
    return [Group(case) for case in tiny if case.operator == "swiglu"]


def _attention_groups(session: Session) -> list[Group]:
    """8B and 1B on chats and 8B on 2,048, then what must compile there; then other lengths, heads and windows. Every
    group has the baseline, so that groups can be compared."""
    backends, baseline = implementations.of("attention"), session.attention_baseline
    eager = tuple(each.name for each in backends if not each.is_compiled)
    compiled = tuple(each.name for each in backends if each.is_compiled or each.name == baseline)
    if session.quick:
        tiny = [Case("attention", TINY, 256, variant=x, window=w) for x, w in (("64", None), (attention.CHATS, 24))]
        return [Group(case, names) for case in tiny for names in (eager, compiled)]
    first, small = attention.cases(["Llama-3-8B"]), attention.cases(["Llama-3.2-1B"])
    rest = first[2:] + small[1:] + attention.cases(["Llama-2-7B"]) + attention.cases(["Llama-3-8B"], attention.WINDOW)
    order = [(first[:2] + small[:1], eager), (first[:2] + small[:1], compiled), (rest, eager), (rest, compiled)]
    return [Group(case, names) for chosen, names in order for case in chosen]


def _all_but(name: str, operator: str) -> tuple[str, ...]:
    return tuple(each.name for each in implementations.of(operator) if each.name != name)


def _cases(model: Model, fractions: list[float], variants: Iterable[str]) -> list[Case]:
    """The head first, then what is bound by memory, the head's other supervised fractions, the optimizer."""
    made = [Case(operator, model, T) for operator in OPERATORS if operator != "adamw"]
    made += [Case("linear_cross_entropy", model, T, fraction) for fraction in fractions[1:]]
    return made + [Case("adamw", model, T, variant=variant) for variant in variants]


def run(phase: str, session: Session, rows: csv_file.CsvFile) -> bool:
    """Measure the phase's groups until the deadline; return whether all of ours ran."""
    is_good = True
    for index, group in enumerate(groups(phase, session)):
        baseline = session.attention_baseline if phase == "attention" else "triton"
        print(f"{phase} {index}: {group.case.operator}, {group.case.title}", flush=True)
        for row in measure(group, session):
            rows.add(session.stamp | row | {"group": f"{phase}-{index}", "baseline": baseline})
            is_good &= row["status"] != "failed" or row["implementation"] not in (*implementations.OURS, baseline)
            print("   ", _line(row), flush=True)
    return is_good


def measure(group: Group, session: Session) -> Iterator[dict[str, Any]]:
    """The rows of one group: failures as they occur, then the measured ones, pass by pass."""
    case, device = group.case, session.device
    chosen = [each for each in implementations.of(case.operator) if group.names is None or each.name in group.names]
    if session.seconds_left() <= 0:
        yield from _excused(case, chosen, case.passes, "skipped", "the time was out")
        return
    expected = _expected(case, device)
    bound = _attention_bound(case, device, expected) if case.operator == "attention" else math.inf
    ready: dict[str, tuple[Implementation, Function, float]] = {}
    for each in chosen:
        try:
            with session.time_to_get_ready(), each.active():
                function = each.load()
                got = _results(function, _problem(case, device, 0))
                error = timing.max_error(got, expected) if expected else math.nan
                if error > bound or (math.isnan(error) and case.operator == "attention"):
                    raise ArithmeticError(f"wrong by {error:.1e} of the largest element, more than {bound:.1e}")
            ready[each.name] = (each, function, error)
        except Exception as problem:
            yield from _excused(case, [each], case.passes, "failed", timing.reason(problem))
            timing.check_alive(device)
    del expected
    problems = _rotation(case, device)
    for which in case.passes:
        yield from _measure_pass(case, which, ready, problems, session)
    timing.free(device)


def _measure_pass(case: Case, which: str, ready: dict, problems: list[Problem], session: Session) -> Iterator[dict]:
    calls, peaks, estimate_ms = {}, {}, 0.0
    around = {name: each.active for name, (each, _, _) in ready.items()}
    for name, (each, function, _) in ready.items():
        call = _rotating(function, which, problems)
        try:
            with session.time_to_get_ready(), each.active():
                call()  # some compile for each pass, or tune
                peaks[name] = timing.peak_gib(call, session.device)
            estimate_ms += timing.interleave({name: call}, 1, session.device, around)[name][0]
            calls[name] = call
        except Exception as problem:
            yield from _excused(case, [each], [which], "failed", timing.reason(problem))
            timing.check_alive(session.device)
    times = timing.interleave(calls, 2 if session.quick else _repeats(case, estimate_ms), session.device, around)
    for name in calls:
        each, _, error = ready[name]
        status = "ok" if each.is_weighted else "unweighted"
        shared = {"implementation": name, "status": status, "peak_gib": peaks[name], "max_error": error}
        yield _measured(case, which, times[name], session.ceilings) | shared


def _repeats(case: Case, estimate_ms: float) -> int:
    """As many turns as fit the time of a pass, within bounds; the sleep before each call counts."""
    seconds = ATTENTION_SECONDS_PER_PASS if case.operator == "attention" else SECONDS_PER_PASS
    return int(min(max(seconds * 1e3 / (estimate_ms + 2.0), FEWEST_REPEATS), MOST_REPEATS))


def _measured(case: Case, which: str, times_ms: list[float], ceilings: Ceilings) -> dict[str, Any]:
    """Times, rates and the share of the floor; the rate is FLOPs for the head and attention, bytes for the others."""
    flops, num_bytes = (attention if case.operator == "attention" else cases).cost(case, which)
    median_ms, p20_ms, p80_ms = csv_file.spread(times_ms).values()
    floor_ms = ceilings.floor_ms(flops, num_bytes)
    return _shape(case, which) | {
        "repeats": len(times_ms), "median_ms": median_ms, "p20_ms": p20_ms, "p80_ms": p80_ms,
        "flops": flops or None, "bytes": num_bytes,
        "tflop_per_s": flops / median_ms / 1e9 if flops else None,
        "gb_per_s": None if flops else num_bytes / median_ms / 1e6,
        "ceiling_tflop_per_s": ceilings.tflop_per_s, "ceiling_gb_per_s": ceilings.gb_per_s,
        "floor_ms": floor_ms, "floor_fraction": floor_ms / median_ms,
    }  # fmt: skip


def _shape(case: Case, which: str) -> dict[str, Any]:
    letters = {letter: getattr(case.model, letter) for letter in "HFNKDV"}
    names = {"operator": case.operator, "model": case.model.name, "variant": case.variant, "window": case.window}
    return names | letters | {"T": case.num_tokens, "supervised": case.supervised, "pass": which}


def _excused(case: Case, whom: list[Implementation], passes: list[str], status: str, note: str) -> Iterator[dict]:
    """Rows that say why there is no number."""
    for each in whom:
        for which in passes:
            yield _shape(case, which) | {"implementation": each.name, "status": status, "note": note}


def _problem(case: Case, device: torch.device, seed: int) -> Problem:
    return (attention if case.operator == "attention" else cases).make_problem(case, device, seed)


def _expected(case: Case, device: torch.device) -> list[Tensor]:
    """What the definition gives for the inputs of seed 0; empty if it fails, which is printed."""
    try:
        if case.operator == "attention":
            return attention.definition(_problem(case, device, 0))
        definition = next(each for each in implementations.of(case.operator) if each.name == "reference")
        return _results(definition.load(), _problem(case, device, 0))
    except Exception as problem:
        print(f"    nothing to compare with: {timing.reason(problem)}", flush=True)
        timing.check_alive(device)
        return []


def _attention_bound(case: Case, device: torch.device, expected: list[Tensor]) -> float:
    """The largest error of a backend that may be timed: twice that of SDPA in bf16, plus a rounding."""
    if not expected:
        return 0.0
    plain = next(each for each in implementations.of("attention") if each.name == "sdpa")
    return 2 * timing.max_error(_results(plain.load(), _problem(case, device, 0)), expected) + ROUNDING


def _results(function: Function, problem: Problem) -> list[Tensor]:
    """Outputs and gradients of one call; for an operator that works in place, what it wrote."""
    outputs = outputs_of(function(problem.arguments))
    if not problem.wanted:
        return [x for name in ("params", "exp_avgs", "exp_avg_sqs") for x in problem.arguments[name]]
    leaves = [problem.arguments[name] for name in problem.wanted]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, problem.upstream))


def _rotation(case: Case, device: torch.device) -> list[Problem]:
    """Enough sets of inputs that none is still in the cache when its turn comes again."""
    problems = [_problem(case, device, 1)]
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**12
    needed = math.ceil(CACHES_BETWEEN_USES * cache / problems[0].num_bytes())
    return problems + [_problem(case, device, 1 + i) for i in range(1, min(needed, 64))]


_uses = 0  # of any set by any implementation: calls that follow each other must not share a set


def _rotating(function: Function, which: str, problems: list[Problem]) -> Callable[[], None]:
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
    who = f"{row['implementation']:<12} {row['pass']:<16}"
    if "median_ms" not in row:
        return f"{who} {row['status']}: {row['note']}"
    return f"{who} {row['median_ms']:9.3f} ms  {row['floor_fraction']:6.1%} of the floor  error {row['max_error']:.1e}"


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.ops", "times the operators", "ops.csv")
    parser.add_argument("--phase", choices=PHASES, action="append", help="several may be given (default: all)")
    options = command_line.parse(parser, arguments, "the interpreter would need days for real shapes")
    device, deadline = torch.device(options.device), time.monotonic() + options.seconds
    ceilings = smoke.read(options.out, device) or timing.measure_ceilings(device, quick=options.quick)
    print(f"ceilings: {ceilings.tflop_per_s:.4g} TFLOP/s, {ceilings.gb_per_s:.4g} GB/s", flush=True)
    session = Session(device, ceilings, csv_file.stamp(device, options.commit), deadline, options.quick)
    rows = csv_file.CsvFile(options.out / "ops.csv", COLUMNS)
    outcomes = [run(phase, session, rows) for phase in options.phase or PHASES]
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
