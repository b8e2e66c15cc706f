"""What a trace of torch.profiler says of some steps: the time of each part, and what waited for the device.

    events = read(Path("runs/a/profile/rank0.json.gz"));  breakdown(events).seconds["attention"];  waits(events)

An operator's part follows from its name and the names of what it ran in: whatever lies in the head's operator is the
head's. With a card, the time is that of its kernels, each linked to the call that launched it; where kernels of several
streams overlap, computation counts, then communication, then copies, so that the parts and the idle rest sum to the
steps. Without one it is that of the thread that trains, each moment the innermost operator's.
"""

from __future__ import annotations

import gzip
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

COMMUNICATION, HEAD, OPTIMIZER, ATTENTION = "communication", "head", "optimizer", "attention"
PRODUCTS, COPIES, ELEMENTWISE, IDLE = "matrix products", "copies and casts", "elementwise", "idle"
PARTS = (ATTENTION, PRODUCTS, HEAD, ELEMENTWISE, COPIES, OPTIMIZER, COMMUNICATION, IDLE)
PATTERNS = {  # the first that a name, or one around it, matches
    COMMUNICATION: r"nccl|gloo|c10d::|FSDP::|fsdp::",
    HEAD: r"linear_cross_entropy|LinearCrossEntropy|ochat_kernels::scale",
    OPTIMIZER: r"^optimizer$",
    ATTENTION: r"scaled_dot_product|ScaledDotProduct|varlen_attn|flash|cudnn_attention",
    PRODUCTS: r"^aten::(addmm_?|mm|bmm|baddbmm|_scaled_mm|_scaled_grouped_mm)$|gemm|nvjet|cutlass",
    COPIES: r"^aten::(copy_|_to_copy)$|Memcpy",
}
ON_CARD = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
STEP = "ProfilerStep#"
OURS = re.compile(r"ochat/(?!train/profile\.py).*\.py\(\d+\): .*")


class Event(NamedTuple):
    """Something that took a while; seconds."""

    kind: str  # the trace's category: cpu_op, user_annotation, python_function, cuda_runtime, kernel, ...
    name: str
    start: float
    end: float
    thread: object
    correlation: int | None = None  # of a call of CUDA's and what it launched


class Span(NamedTuple):
    """A while in which a part runs, unless a part of higher priority runs too."""

    start: float
    end: float
    priority: int
    part: str


@dataclass(frozen=True)
class Breakdown:
    """Of `steps` steps together."""

    steps: int
    seconds: dict[str, float]  # by PARTS; they sum to the time from the first step's start to the last one's end


@dataclass(frozen=True)
class Wait:
    """Calls at one place that kept the host until the device was done."""

    call: str  # cudaStreamSynchronize, ...
    operator: str  # aten::item, ...
    place: str  # ochat/train/metrics.py(120): flush
    count: int
    seconds: float


def read(path: Path) -> list[Event]:
    """The events of a gzipped chrome trace."""
    with gzip.open(path, "rt") as file:
        records = json.load(file)["traceEvents"]
    return [
        Event(r["cat"], r["name"], r["ts"] / 1e6, (r["ts"] + r["dur"]) / 1e6, (r.get("pid"), r.get("tid")),
              r.get("args", {}).get("correlation"))
        for r in records
        if r.get("ph") == "X" and "cat" in r
    ]  # fmt: skip


def breakdown(events: list[Event]) -> Breakdown:
    """Where the time of the trace's steps went. Raises: ValueError where it has none."""
    steps = [e for e in events if e.name.startswith(STEP) and e.kind == "user_annotation"]
    if not steps:
        raise ValueError(f"no {STEP} in the trace: record it with a schedule")
    start, end = min(e.start for e in steps), max(e.end for e in steps)
    on_card = [e for e in events if e.kind in ON_CARD and start <= e.start < end]
    spans = _card_spans(events, on_card) if on_card else _host_spans(events, steps[0].thread)
    seconds = _sweep([s for s in spans if s.start < end and s.end > start], start, end)
    return Breakdown(len(steps), {part: seconds[part] for part in PARTS})


def waits(events: list[Event]) -> list[Wait]:
    """What waited for the device within the steps, the longest first. Places need a trace with stacks."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    steps = [(e.start, e.end) for e in events if e.name.startswith(STEP) and e.kind == "user_annotation"]
    for event, chain in _nested(events):
        is_wait = event.kind in CALLS and "Synchronize" in event.name
        if is_wait and any(start <= event.start < end for start, end in steps) and not _is_profilers(chain):
            found[event.name, _operator(chain), _place(chain)].append(event.end - event.start)
    grouped = [Wait(*key, len(times), sum(times)) for key, times in found.items()]
    return sorted(grouped, key=lambda wait: -wait.seconds)


def _host_spans(events: list[Event], thread: object) -> Iterator[Span]:
    """Operators of one thread, the inner ones first; and what waits for other ranks, which is no operator."""
    mine = [e for e in events if e.thread == thread and e.kind in ("cpu_op", "user_annotation")]
    for event, chain in _nested(mine):
        part = _part(chain)
        if part == COMMUNICATION or event.kind == "cpu_op":
            yield Span(event.start, event.end, len(chain), part)


def _card_spans(events: list[Event], on_card: list[Event]) -> Iterator[Span]:
    launches = {e.correlation: chain for e, chain in _nested(events) if e.kind in CALLS}
    for event in on_card:
        part = _part((*launches.get(event.correlation, ()), event))
        yield Span(event.start, event.end, {COPIES: 0, COMMUNICATION: 1}.get(part, 2), part)


def _nested(events: Iterable[Event]) -> Iterator[tuple[Event, tuple[Event, ...]]]:
    """Each event of the host with those that it lies within on its thread, outermost first and itself last."""
    stacks: dict[object, list[Event]] = defaultdict(list)
    for event in sorted((e for e in events if e.kind not in ON_CARD), key=lambda e: (e.start, -e.end)):
        stack = stacks[event.thread]
        while stack and stack[-1].end <= event.start:
            stack.pop()
        stack.append(event)
        yield event, tuple(stack)


def _part(chain: tuple[Event, ...]) -> str:
    return [*PATTERNS, ELEMENTWISE][min(_rank(event.name) for event in chain)]


@cache
def _rank(name: str) -> int:
    return next((i for i, p in enumerate(PATTERNS.values()) if re.search(p, name)), len(PATTERNS))


def _sweep(spans: list[Span], start: float, end: float) -> dict[str, float]:
    """Every moment between start and end goes to one part: the running span of the highest priority, or IDLE."""
    totals: dict[str, float] = defaultdict(float)
    edges = {start, end} | {min(max(t, start), end) for span in spans for t in (span.start, span.end)}
    waiting, running = sorted(spans, reverse=True), []
    for now, following in pairwise(sorted(edges)):
        while waiting and waiting[-1].start <= now:
            span = waiting.pop()
            heapq.heappush(running, (-span.priority, span.end, span.part))
        while running and running[0][1] <= now:
            heapq.heappop(running)
        totals[running[0][2] if running else IDLE] += following - now
    return totals


def _operator(chain: tuple[Event, ...]) -> str:
    """What Python called: the outermost operator below its innermost frame."""
    operators: list[str] = []
    for event in chain:
        operators = [] if event.kind == "python_function" else operators + [event.name] * (event.kind == "cpu_op")
    return operators[0] if operators else ""


def _place(chain: tuple[Event, ...]) -> str:
    """The innermost line of ours; the backward pass runs where Python has none."""
    frames = [m[0] for e in chain if e.kind == "python_function" and (m := OURS.search(e.name))]
    nodes = [e.name.split(": ")[-1] for e in chain if e.name.startswith("autograd::engine")]
    return (frames or nodes or ["(not in ochat)"])[-1]


def _is_profilers(chain: tuple[Event, ...]) -> bool:
    frames = [e.name for e in chain if e.kind == "python_function" and "ochat/" in e.name]
    return bool(frames) and "ochat/train/profile.py" in frames[-1]
