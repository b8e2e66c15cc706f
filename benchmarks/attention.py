"""Which attention is fastest on a card, by document length: rows of a CSV, then what `attention = "auto"` would take.

    PYTHONPATH=.:kernels python -m benchmarks.attention --out DIR       # dry run: --device cpu --quick
Each candidate is held to the definition in fp32 first. How a time is taken: bench.py; FLOPs: attention_cases.cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import attention_cases, attention_verdict, bench, command_line
from benchmarks.attention_backends import BACKENDS, Attend, Backend
from benchmarks.attention_cases import CHATS, PASSES, WINDOW, Case, Problem, results
from benchmarks.cases import Model
from benchmarks.ops import Session
from ochat.model.attention import default_backend

COLUMNS = [
    *("date", "commit", "device", "torch", "triton", "driver", "group", "model", "lengths", "documents", "window"),
    *("T", "N", "K", "D", "implementation", "baseline", "pass", "status", "note"),
    *("repeats", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "tflop_per_s"),
    *("ceiling_tflop_per_s", "ceiling_gb_per_s", "floor_ms", "floor_fraction", "peak_gib", "max_error"),
]
TINY = Model("tiny", H=64, F=96, N=4, K=2, D=16, V=257)
SECONDS_PER_PASS = 0.3  # of measuring, all backends of a group together
MOST_REPEATS, FEWEST_REPEATS = 30, 5
ROUNDING = 2**-8  # one bf16 rounding, of the largest element


class Group(NamedTuple):
    """Backends that take turns on one case."""

    case: Case
    backends: tuple[Backend, ...]


def groups(baseline: str, *, quick: bool) -> list[Group]:
    """The most wanted first: 8B at every length, then what must compile beside the baseline, then other heads and
    windows. Every group has the baseline, so that groups can be compared."""
    eager = tuple(each for each in BACKENDS if not each.is_compiled)
    compiled = tuple(each for each in BACKENDS if each.is_compiled or each.name == baseline)
    if quick:
        tiny = [Case(TINY, "64", num_tokens=256), Case(TINY, CHATS, 24, num_tokens=256)]
        return [Group(case, names) for case in tiny for names in (eager, compiled)]
    first = attention_cases.cases(["Llama-3-8B"])
    rest = attention_cases.cases(["Llama-2-7B", "Llama-3.2-1B"]) + attention_cases.cases(["Llama-3-8B"], WINDOW)
    order = [(first, eager), (first[:2], compiled), (rest, eager), (first[2:] + rest, compiled)]
    return [Group(case, names) for chosen, names in order for case in chosen]


def measure(group: Group, session: Session) -> Iterator[dict[str, Any]]:
    """The rows of one group, pass by pass: those that can't run as they are met, then the measured ones."""
    everyone = [(each, which) for which in PASSES for each in group.backends]
    if session.seconds_left() <= 0:
        yield from (_excused(*pair, "skipped", "the time was out") for pair in everyone)
        return
    try:
        passes = _passes(group.case, session)
    except Exception as failure:
        bench.check_alive(session.device)
        note = f"nothing to compare with: {bench.reason(failure)}"
        yield from (_excused(*pair, "failed", note) for pair in everyone)
        return
    functions: dict[str, Attend] = {}
    for one in passes:
        yield from _measure_pass(group, one, functions)
    del passes, one
    functions.clear()
    bench.free(session.device)


@dataclass(frozen=True)
class _Pass:
    """One pass of one case, and what it must give."""

    which: str
    problem: Problem
    truth: list[Tensor]
    bound: float  # of the largest error
    session: Session


def _passes(case: Case, session: Session) -> list[_Pass]:
    """A backend may be at most twice as far from the definition in fp32 as the definition in bf16 is, and a rounding:
    the rule of tests/numerics.py."""
    problem = attention_cases.make_problem(case, session.device)
    plain, truth = BACKENDS[0].prepare(problem.documents, problem.window), attention_cases.definition(problem)
    truths = {"forward": truth[:1], "forward+backward": truth}
    errors = {which: bench.max_error(results(plain, problem, which), truths[which]) for which in PASSES}
    return [_Pass(which, problem, truths[which], 2 * errors[which] + ROUNDING, session) for which in PASSES]


def _measure_pass(group: Group, one: _Pass, functions: dict[str, Attend]) -> Iterator[dict[str, Any]]:
    """`functions` are the prepared ones by name, which the next pass finds again."""
    ready, shared, estimate_ms, device = {}, {}, 0.0, one.session.device
    for each in group.backends:
        try:
            with one.session.time_to_get_ready(), each.active():
                attend = functions.get(each.name) or each.prepare(one.problem.documents, one.problem.window)
                functions[each.name] = attend
                call = partial(results, attend, one.problem, one.which)
                error = bench.max_error(call(), one.truth)  # some compile for each pass
                if not error <= one.bound:
                    raise ArithmeticError(f"wrong by {error:.1e} of the largest element, more than {one.bound:.1e}")
                shared[each.name] = {"peak_gib": bench.peak_gib(call, device), "max_error": error}
                estimate_ms += bench.interleaved({"": call}, 1, device)[""][0]
            ready[each.name] = (each, call)
        except Exception as failure:
            bench.check_alive(device)
            yield _excused(each, one.which, "failed", bench.reason(failure))
    repeats = 2 if one.session.quick else _repeats(estimate_ms, len(ready))
    for name, marks_ms in _in_turns(ready, repeats, device).items():
        row = {"implementation": name, "pass": one.which, "status": "ok"} | shared[name]
        yield row | _rates(group.case, one.which, marks_ms, one.session.ceilings)


def _repeats(estimate_ms: float, count: int) -> int:
    """As many turns as fit the time of a pass, within bounds; the lead of each call counts."""
    turn_ms = estimate_ms + 3.0 * max(count, 1)
    return int(min(max(SECONDS_PER_PASS * 1e3 / turn_ms, FEWEST_REPEATS), MOST_REPEATS))


def _in_turns(
    ready: dict[str, tuple[Backend, Callable[[], Any]]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """As bench.interleaved, but each backend's FlashAttention inside torch is put in its place and away around it."""
    marks_ms: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, (backend, call) in ready.items():
            with backend.active():
                marks_ms[name] += bench.interleaved({name: call}, 1, device)[name]
    return marks_ms


def _rates(case: Case, which: str, marks_ms: list[float], ceilings: bench.Ceilings) -> dict[str, Any]:
    flops, num_bytes = attention_cases.cost(case, which)
    median_ms, floor_ms = bench.percentile(marks_ms, 50), ceilings.floor_ms(flops, num_bytes)
    return {
        "repeats": len(marks_ms),
        "median_ms": median_ms,
        "p20_ms": bench.percentile(marks_ms, 20),
        "p80_ms": bench.percentile(marks_ms, 80),
        "flops": flops,
        "bytes": num_bytes,
        "tflop_per_s": flops / median_ms / 1e9,
        "ceiling_tflop_per_s": ceilings.tflop_per_s,
        "ceiling_gb_per_s": ceilings.gb_per_s,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / median_ms,
    }


def _excused(each: Backend, which: str, status: str, note: str) -> dict[str, Any]:
    """A row that says why there is no number."""
    return {"implementation": each.name, "pass": which, "status": status, "note": note}


def _shape(case: Case) -> dict[str, Any]:
    letters = {letter: getattr(case.model, letter) for letter in "NKD"}
    names = {"model": case.model.name, "lengths": case.lengths, "window": case.window}
    return names | letters | {"documents": len(case.documents()), "T": case.num_tokens}


def run(session: Session, rows: bench.Rows) -> bool:
    """Measures all groups until the time is over; returns whether the product's own backend ran wherever it began."""
    baseline, is_good, shown = default_backend(session.device, torch.bfloat16), True, set()
    for index, group in enumerate(groups(baseline, quick=session.quick)):
        print(f"{index}: {group.case.title}", flush=True)
        shared = _shape(group.case) | {"group": index, "baseline": baseline}
        for row in measure(group, session):
            rows.add(session.stamp | shared | row)
            is_good &= row["status"] != "failed" or row["implementation"] != baseline
            line = _line(row)
            if "median_ms" in row or line not in shown:
                print("   ", line, flush=True)
            shown.add(line)
    return is_good


def _line(row: dict[str, Any]) -> str:
    who = f"{row['implementation']:<12} {row['pass']:<16}"
    if "median_ms" not in row:
        return f"{who} {row['status']}: {row['note']}"
    return f"{who} {row['median_ms']:9.3f} ms  {row['tflop_per_s']:6.1f} TFLOP/s  error {row['max_error']:.1e}"


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.attention", "times the backends of attention", "attention.csv")
    why_quick = "only tiny shapes run there, and their times say nothing"
    options = command_line.parse(parser, arguments, why_quick)
    device, deadline = torch.device(options.device), time.monotonic() + options.seconds
    ceilings = bench.measure_ceilings(device, quick=options.quick)
    session = Session(device, ceilings, bench.stamp(device, options.commit), deadline, options.quick)
    is_good = run(session, bench.Rows(options.out / "attention.csv", COLUMNS))
    attention_verdict.show(options.out / "attention.csv")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
