"""`ochat train CONFIG.toml --profile`: time per part of a step next to its roofline, and what the host waited for.

Warms up, records a few steps, and ends. It trains in RUN/profile, from the base: the run itself stays as it is.
RUN/profile/rankN.json.gz opens in chrome://tracing or ui.perfetto.dev.

An operator's part follows from its name and the names of what it ran in: all that the head's operator calls is the
head's. On a GPU the time is that of its kernels, each attributed to the call that launched it; of kernels that overlap,
computation counts first, then communication, then copies, so that parts and idle time sum to the steps. On a CPU it is
each operator's own time on the training thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from rich.table import Table
from torch.autograd import DeviceType  # type: ignore[reportPrivateImportUsage]
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as profiler

from ochat.config import Config
from ochat.data.batch import PackedBatch
from ochat.plan import gpus
from ochat.plan.forecast import PlanInputs
from ochat.plan.gpus import GpuSpec
from ochat.plan.lengths import LengthCounts
from ochat.plan.roofline import Workload
from ochat.run import layout as run_layout
from ochat.train.trainer import Trainer, train

WARM_UP, RECORDED = 3, 3  # steps
STEPS = WARM_UP + (1 + RECORDED) + (1 + 1)  # each recording warms up for one step; the second records one with stacks
ROOFLINE = "roofline: as ochat plan predicts each part on this GPU; elementwise includes copies and casts"
ROOFLINE_OF_MATMUL = "roofline: FLOPs over the peak that mfu is taken of; other parts have none on an unknown device"

COMMUNICATION, HEAD, OPTIMIZER, ATTENTION = "communication", "head", "optimizer", "attention"
MATMUL, COPIES, ELEMENTWISE, IDLE = "matmul", "copies and casts", "elementwise", "idle"
PARTS = (ATTENTION, MATMUL, HEAD, ELEMENTWISE, COPIES, OPTIMIZER, COMMUNICATION, IDLE)
PATTERNS = {  # the first that a name, or one around it, matches
    COMMUNICATION: r"nccl|gloo|c10d::|FSDP::|fsdp::",
    HEAD: r"linear_cross_entropy|LinearCrossEntropy|ochat_kernels::scale",
    OPTIMIZER: r"^optimizer$",
    ATTENTION: r"scaled_dot_product|ScaledDotProduct|varlen_attn|[fF]lash|flex_attention|cudnn_attention",
    MATMUL: r"^aten::(addmm_?|mm|bmm|baddbmm|_scaled_mm|_scaled_grouped_mm)$|gemm|nvjet|cutlass",
    COPIES: r"^aten::(copy_|_to_copy)$|Memcpy",
}
STEP = "ProfilerStep"
PYTHON = re.compile(r"\.py\(\d+\): |^<built-in ")
OURS = re.compile(r"ochat/.*\.py\(\d+\): .*")


def profile(config: Config) -> list[Table | str]:
    """Record steps of the run that `config` describes; what to print, nothing on ranks other than the first.

    Raises: as train.
    """
    run = structs.replace(config.run, dir=str(Path(config.run.dir) / run_layout.PROFILE), resume="never")
    data = structs.replace(config.data, epochs=max(config.data.epochs, STEPS), max_steps=STEPS, eval_path="")
    config = structs.replace(config, eval={}, checkpoint=structs.replace(config.checkpoint, best=""))
    found: list[Table | str] = []
    train(structs.replace(config, run=run, data=data), run=lambda trainer: found.extend(record(trainer)))
    return found


def record(trainer: Trainer) -> list[Table | str]:
    """Run STEPS steps and write each rank's traces; the report of the first rank, nothing on others."""
    trainer.announce()
    steps = trainer.loader.iterate(0)
    for _ in range(WARM_UP):
        _step(trainer, steps)
    path = trainer.run_dir / f"rank{trainer.ranks.rank}.json.gz"
    events, batches = _record(trainer, steps, path, RECORDED, stacks=False)
    with_stacks = path.with_name(f"rank{trainer.ranks.rank}-stacks.json.gz")
    events_with_stacks, _ = _record(trainer, steps, with_stacks, 1, stacks=True)
    if not trainer.ranks.is_first:
        return []
    seconds = {part: total / RECORDED for part, total in part_seconds(events).items()}
    shown = report(seconds, rooflines(trainer, batches))
    waits = sync_points(events_with_stacks) or ["The host never waited for the device."]
    return [*shown, *waits, f"traces of every process: {path.parent}"]


def rooflines(trainer: Trainer, batches: list[list[PackedBatch]]) -> dict[str, float]:
    """Seconds of a mean step that the plan predicts for each part; on an unknown device for matmuls alone, at the peak
    that mfu is taken of."""
    config, model, ranks = trainer.config, trainer.inputs.model_config, trainer.ranks
    all_batches = [batch for step in batches for batch in step]
    lengths = np.array([n for b in all_batches for n in b.lengths[: len(b.sequences)]])
    tokens, computed = sum(b.num_tokens for b in all_batches), sum(b.input_ids.shape[0] for b in all_batches)
    supervised = sum(b.num_supervised for b in all_batches)
    workload = Workload(LengthCounts.of(lengths), supervised / tokens, tokens / computed)
    sections = config.data, config.train, config.optim, config.parallel, config.lora, config.base
    inputs = PlanInputs(model, workload, STEPS, *sections)
    layout = inputs.layout(ranks.world, torch.cuda.device_count() or 1, computed // len(all_batches))
    tflops, unlimited = trainer.resolved.peak_flops / 1e12, float("inf")
    matmul_only = GpuSpec("", 0.0, tflops, tflops, 0.0, (tflops,) * 4, (tflops,) * 4, unlimited, unlimited, unlimited)
    known = gpus.lookup(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    least = inputs.speed(known or matmul_only, layout)
    again = config.train.recompute == "block"
    found = {
        MATMUL: least.matmul * (1 + again / layout.matmuls_of_weight),
        HEAD: least.head,
        ATTENTION: least.attention * (1 + again * 2 / 7),
    }
    if known is None:
        per_token = workload.attention_per_token(model) * (1 + again / 3)
        return found | {ATTENTION: per_token * tokens / len(batches) / trainer.resolved.peak_flops}
    rest = least.memory_bound + least.recompute - (found[MATMUL] - least.matmul)
    found[ELEMENTWISE] = rest - (found[ATTENTION] - least.attention)
    return found | {OPTIMIZER: least.optimizer, COMMUNICATION: least.communication}


def report(seconds: dict[str, float], least: dict[str, float]) -> list[Table | str]:
    """The parts of a mean step next to their rooflines, and what a roofline is."""
    table = Table("part", box=None, padding=(0, 3, 0, 0), title=f"a step, mean of {RECORDED}", title_justify="left")
    for column in ("ms", "share", "roofline ms", "times roofline"):
        table.add_column(column, justify="right")
    total, whole, is_whole = sum(seconds.values()), sum(least.values()), ELEMENTWISE in least
    for part in PARTS:
        limit = least.get(part)
        cells = (f"{1e3 * limit:,.2f}", f"{seconds[part] / limit:.2f}") if limit else ("", "")
        table.add_row(part, f"{1e3 * seconds[part]:,.2f}", f"{seconds[part] / total:.1%}", *cells)
    ratio = f"{total / whole:.2f}" if is_whole else ""
    table.add_row("step", f"{1e3 * total:,.2f}", "100.0%", f"{1e3 * whole:,.2f}", ratio)
    return [table, ROOFLINE if is_whole else ROOFLINE_OF_MATMUL]


def part_seconds(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Where the time of the recorded steps went, by PARTS; the values sum to the steps."""
    steps = [e for e in events if e.name.startswith(STEP) and e.device_type == DeviceType.CPU]
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    if not on_gpu:
        for event in (e for e in events if e.thread == steps[0].thread and not e.is_async):
            chain = _chain(event)
            part = _part(chain)
            if chain[0] in steps:
                is_operator = not event.is_user_annotation or part == COMMUNICATION
                found[part if is_operator else IDLE] += event.self_cpu_time_total / 1e6
        return found
    start, end = min(e.time_range.start for e in steps), max(e.time_range.end for e in steps)
    launches = {e.id: e for e in events if e.device_type == DeviceType.CPU and e.name.startswith("cu")}
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in (e for e in on_gpu if start <= e.time_range.start < end):
        chain = _chain(launches[event.id]) if event.id in launches else []
        spans[_part([*chain, event])].append((event.time_range.start, min(event.time_range.end, end)))
    covered, counted = 0.0, []
    for parts in (set(PARTS) - {COMMUNICATION, COPIES, IDLE}, {COMMUNICATION}, {COPIES}):
        counted += [span for part in parts for span in spans[part]]
        busy = {part: sum(high - low for low, high in spans[part]) for part in parts}
        exposed = (total := _union(counted)) - covered
        for part in parts:
            found[part] = exposed * busy[part] / max(sum(busy.values()), 1e-9) / 1e6
        covered = total
    return found | {IDLE: (end - start - covered) / 1e6}


def sync_points(events: Sequence[FunctionEvent]) -> list[str]:
    """A line for each place where the host waited for the device within the steps, the longest first. Places need
    events with stacks."""
    steps = [e for e in events if e.name.startswith(STEP) and e.device_type == DeviceType.CPU]
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in (e for e in events if e.name.startswith("cu") and "Synchronize" in e.name):
        span = event.time_range
        if not any(step.time_range.start <= span.start < step.time_range.end for step in steps):
            continue
        names = [each.name for each in _chain(event)]
        if len(names) == 1:  # torch links a call to its operator alone: one outside any is placed by its time
            around = [e for e in events if e.thread == steps[0].thread and e is not event and holds(e, event)]
            names = [e.name for e in sorted(around, key=lambda e: (e.time_range.start, -e.time_range.end))] + names
        operator, place = _call(names)
        if "ochat/train/profile.py" not in place:
            found[event.name, operator, place].append(span.elapsed_us() / 1e6)
    return [
        f"waited {1e3 * sum(times):,.2f} ms in {len(times)} x {call}, {operator} at {place}"
        for (call, operator, place), times in sorted(found.items(), key=lambda item: -sum(item[1]))
    ]


def _chain(event: FunctionEvent) -> list[FunctionEvent]:
    """What an event ran in, outermost first, and itself."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    return chain[::-1]


def holds(outer: FunctionEvent, inner: FunctionEvent) -> bool:
    """Whether one ran within the other."""
    return outer.time_range.start <= inner.time_range.start and inner.time_range.end <= outer.time_range.end


def _part(chain: Sequence[FunctionEvent]) -> str:
    names = "\n".join(event.name for event in chain)  # ^ and $ match at the ends of each
    return next((part for part, pattern in PATTERNS.items() if re.search(pattern, names, re.MULTILINE)), ELEMENTWISE)


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """The length that spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return covered


def _call(names: Sequence[str]) -> tuple[str, str]:
    """What Python called, the outermost operator below its innermost frame; and the innermost line of ochat, or in
    backward, which has none, the autograd node."""
    frames = [i for i, name in enumerate(names[:-1]) if PYTHON.search(name) or name.startswith(STEP)]
    operators = [*names[frames[-1] + 1 if frames else 0 : -1], ""]
    ours = [match[0] for name in names if (match := OURS.search(name))]
    nodes = [name.split(": ")[-1] for name in names if name.startswith("autograd::engine")]
    return operators[0], (ours or nodes or ["(not in ochat)"])[-1]


def _record(
    trainer: Trainer, steps: Iterator[tuple[int, list[PackedBatch]]], path: Path, count: int, *, stacks: bool
) -> tuple[Sequence[FunctionEvent], list[list[PackedBatch]]]:
    """Events and batches of `count` steps, after one in which the profiler warms up. Writes their trace to `path`."""
    on_gpu = trainer.ranks.device.type == "cuda"
    with profiler(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=schedule(wait=0, warmup=1, active=count),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
        with_stack=stacks,
        acc_events=True,
    ) as recorder:
        batches = []
        for i in range(1 + count):
            batches.append(_step(trainer, steps))
            if on_gpu and i in (0, count):
                torch.cuda.synchronize()  # what the device still has to do belongs to these steps
            recorder.step()
    return recorder.events() or [], batches[1:]


def _step(trainer: Trainer, steps: Iterator[tuple[int, list[PackedBatch]]]) -> list[PackedBatch]:
    """A step as a run does it, with its log lines."""
    step, batches = next(steps)
    trainer.step(step, batches)
    if trainer.steps_done % trainer.config.train.log_every == 0:
        trainer.metrics.flush()
    return batches
