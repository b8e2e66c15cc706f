"""`ochat train CONFIG.toml --profile`: where the time of a step goes, beside the least that it could take.

Warms up, records a few steps, and ends. It trains in RUN/profile, from the base: what the run itself has written stays
as it is, and the same command without --profile goes on. RUN/profile/rankN.json.gz opens in chrome://tracing or
ui.perfetto.dev.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from msgspec import structs
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, schedule
from torch.profiler import profile as profiler

from ochat.config import Config
from ochat.data.batch import PackedBatch
from ochat.model import lora
from ochat.plan import gpus, roofline
from ochat.plan.gpus import GpuSpec
from ochat.plan.layout import Layout
from ochat.plan.lengths import LengthCounts
from ochat.plan.roofline import Workload
from ochat.train import trace
from ochat.train.trace import Breakdown, Wait
from ochat.train.trainer import Trainer, train

FOLDER = "profile"
WARM_UP, RECORDED = 3, 3  # steps
STEPS = WARM_UP + (1 + RECORDED) + (1 + 1)  # each recording has one to settle; the second is one step with stacks
FLOORS = "floor: as ochat plan predicts each part on this card; that of elementwise holds copies and casts too"
FLOORS_OF_PRODUCTS = "floor: FLOPs over the peak that mfu is taken of; other parts have none on an unknown device"


def profile(config: Config) -> None:
    """Records steps of the run that `config` describes and prints their table. Raises: as train."""
    run = structs.replace(config.run, dir=str(Path(config.run.dir) / FOLDER), resume="never")
    data = structs.replace(config.data, epochs=max(config.data.epochs, STEPS), max_steps=STEPS, eval_path="")
    train(structs.replace(config, run=run, data=data), run=record)


def record(trainer: Trainer) -> None:
    """Runs STEPS steps; every rank writes its trace, the first one prints its table."""
    trainer.announce()
    steps = trainer.loader.iterate(0)
    for _ in range(WARM_UP):
        _step(trainer, steps)
    path = trainer.run_dir / f"rank{trainer.ranks.rank}.json.gz"
    batches = _record(trainer, steps, path, RECORDED, stacks=False)
    with_stacks = path.with_name(f"rank{trainer.ranks.rank}-stacks.json.gz")
    _record(trainer, steps, with_stacks, 1, stacks=True)
    if trainer.ranks.is_first:
        found, waits = trace.breakdown(trace.read(path)), trace.waits(trace.read(with_stacks))
        show(found, floors(trainer, batches), waits, Console(highlight=False))
        trainer.display.note(f"traces of every process: {path.parent}")


def floors(trainer: Trainer, batches: list[list[PackedBatch]]) -> dict[str, float]:
    """Seconds of a mean step that each part would take at the card's rates, as speed.py predicts it; where the card is
    not known, of products alone, at the peak that mfu is taken of."""
    config, model, ranks = trainer.config, trainer.model_config, trainer.ranks
    all_batches = [batch for step in batches for batch in step]
    lengths = np.array([n for b in all_batches for n in b.lengths[: len(b.sequences)]])
    tokens, computed = sum(b.num_tokens for b in all_batches), sum(b.input_ids.shape[0] for b in all_batches)
    supervised = sum(b.num_supervised for b in all_batches)
    workload = Workload(LengthCounts.of(lengths), supervised / tokens, tokens / computed)
    known = gpus.lookup(torch.cuda.get_device_name(ranks.device)) if ranks.device.type == "cuda" else None
    cut = Layout(
        computed // len(all_batches), len(all_batches) // len(batches) * ranks.world, config.train.recompute,
        ranks.world, ranks.shard[1], itemsize=4 if config.train.dtype == "float32" else 2,
        adapters=lora.num_parameters(model, config.lora),
    )  # fmt: skip
    least = roofline.predict(model, known or _products_only(trainer.peak), workload, cut)
    again = config.train.recompute == "block"
    found = {
        trace.PRODUCTS: least.matmul * (1 + again / cut.matmuls_of_weight),
        trace.HEAD: least.head,
        trace.ATTENTION: least.attention * (1 + again * 2 / 7),
    }
    if known is None:
        per_token = workload.attention_per_token(model) * (1 + again / 3)
        return found | {trace.ATTENTION: per_token * tokens / len(batches) / trainer.peak}
    rest = least.memory_bound + least.recompute - (found[trace.PRODUCTS] - least.matmul)
    found[trace.ELEMENTWISE] = rest - (found[trace.ATTENTION] - least.attention)
    return found | {trace.OPTIMIZER: least.optimizer, trace.COMMUNICATION: least.communication}


def show(found: Breakdown, floors: dict[str, float], waits: list[Wait], console: Console) -> None:
    """Prints the parts of a mean step and what waited for the device."""
    total = sum(found.seconds.values())
    table = Table("part", box=None, padding=(0, 3, 0, 0), title=f"a step, mean of {found.steps}", title_justify="left")
    for column in ("ms", "share", "floor ms", "times floor"):
        table.add_column(column, justify="right")
    for part in trace.PARTS:
        seconds, floor = found.seconds[part] / found.steps, floors.get(part)
        beside = (f"{1e3 * floor:,.2f}", f"{seconds / floor:.2f}") if floor else ("", "")
        table.add_row(part, f"{1e3 * seconds:,.2f}", f"{found.seconds[part] / total:.1%}", *beside)
    least, is_whole = sum(floors.values()), trace.ELEMENTWISE in floors
    ratio = f"{total / found.steps / least:.2f}" if is_whole else ""
    table.add_row("step", f"{1e3 * total / found.steps:,.2f}", "100.0%", f"{1e3 * least:,.2f}", ratio)
    console.print(table)
    console.print(FLOORS if is_whole else FLOORS_OF_PRODUCTS)
    if not waits:
        console.print("Nothing in the step waited for the device.")
    for wait in waits:
        console.print(
            f"[yellow]waited[/] {1e3 * wait.seconds:,.2f} ms in {wait.count} x {escape(wait.call)}, "
            f"{escape(wait.operator)} at {escape(wait.place)}"
        )


def _record(
    trainer: Trainer, steps: Iterator[tuple[int, list[PackedBatch]]], path: Path, count: int, *, stacks: bool
) -> list[list[PackedBatch]]:
    """The batches of `count` steps whose trace goes to `path`, after one step in which the profiler settles."""
    on_card = trainer.ranks.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
    order = schedule(wait=0, warmup=1, active=count)
    with profiler(
        activities=activities, schedule=order, with_stack=stacks, acc_events=True,
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    ) as recorder:  # fmt: skip
        batches = []
        for i in range(1 + count):
            batches.append(_step(trainer, steps))
            if on_card and i in (0, count):
                torch.cuda.synchronize()  # what the device still has to do belongs to these steps
            recorder.step()
    return batches[1:]


def _step(trainer: Trainer, steps: Iterator[tuple[int, list[PackedBatch]]]) -> list[PackedBatch]:
    """A step as a run does it, its log lines included."""
    step, batches = next(steps)
    trainer.step(step, batches)
    if trainer.steps_done % trainer.config.train.log_every == 0:
        trainer.journal.flush()
    return batches


def _products_only(peak: float) -> GpuSpec:
    """A card of which no more than its products' rate is known."""
    tflops, unknown = peak / 1e12, float("inf")
    return GpuSpec("", 0.0, tflops, tflops, (tflops,) * 4, unknown, unknown, unknown)
