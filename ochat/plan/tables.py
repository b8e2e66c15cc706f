"""Tables of what a plan predicts, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from ochat.plan.forecast import POLICIES, Forecast, PlanInputs, rounded_up
from ochat.plan.memory import GIB
from ochat.plan.roofline import PARTS

PREDICTED = (
    "Predicted, not measured: FLOPs and bytes over what the GPUs reach, with FlashAttention-2, which torch's varlen "
    "attention runs (formulas: ochat/plan/memory.py, roofline.py). Kernels that fall short make it slower."
)
MEMORY_PARTS = ("gradients", "weights", "activations", "working", "allowance", "total")
MEMORY_LEGEND = (
    "state: master weights and both moments; weights: casts or gathered blocks that matmuls read; working: the head's "
    "logits and gradients in flight; allowance: assumed for CUDA, NCCL and fragmentation"
)
TIME_COLUMNS = {
    "memory_bound": "memory", "recompute": "recomp.", "launches": "launch", "communication": "comm.",
    "optimizer": "optim.", "imbalance": "imbal.",
}  # fmt: skip
TIME_LEGEND = (
    "memory: norms, RoPE, SwiGLU and casts, which memory bandwidth limits; launch: host time beyond the GPU's; comm.: "
    "what does not overlap with computation; imbal.: waiting for the fullest bin"
)
SAVINGS = (
    'train.recompute = "block", parallel.reduce = "micro_batch", optim.moment_dtype and optim.master_dtype = '
    '"bfloat16", parallel.offload = "optimizer", lora.rank = 16, or more GPUs'
)


def shown(forecasts: Sequence[Forecast], inputs: PlanInputs) -> list[Table | str]:
    """What `ochat plan` prints of memory and speed: tables, legends and notes."""
    budget, gpu = f"token_budget {inputs.data.token_budget:,}", ("GPUs", "card")
    memory = {(each.ranks, each.recompute): _memory_cells(each) for each in forecasts}  # the same on each kind of GPU
    fitting = [each for each in forecasts if each.fits]
    names = [TIME_COLUMNS.get(part, part) for part in PARTS]
    speed = ("memory", "fits", "tokens/s", "a GPU", "MFU", "a step", "the run")
    return [
        f"[dim]{PREDICTED}[/]", "",
        _table(f"planned memory of a GPU in GiB, {budget}", ("GPUs", "recompute", "state", *MEMORY_PARTS),
               memory.values(), 1),
        f"[dim]{MEMORY_LEGEND}[/]", "",
        _table("as configured", (*gpu, *speed), map(_speed_cells, forecasts)), "",
        _table("a step's time, %", (*gpu, *names), map(_time_cells, fitting), 1),
        f"[dim]{TIME_LEGEND}[/]", "",
        _table("train.recompute: GiB and tokens/s of a GPU", (*gpu, *POLICIES, "largest token_budget"),
               map(_recompute_cells, forecasts)),
        *(f"[yellow]note[/] {escape(note)}" for note in notes(forecasts, inputs)),
    ]  # fmt: skip


def _memory_cells(each: Forecast) -> list[str]:
    bytes_of = [each.use.masters + each.use.moments, *(getattr(each.use, part) for part in MEMORY_PARTS)]
    return [f"{each.ranks:,}", each.recompute, *(f"{size / GIB:,.1f}" for size in bytes_of)]


def _speed_cells(each: Forecast) -> list[str]:
    cells = [f"{each.ranks:,}", each.gpu.name, f"{each.use.total / GIB:,.0f}/{each.gpu.memory_gib:.0f} GiB"]
    if not each.fits:
        return [*cells, "[red]no[/]", *["-"] * 5]
    rate, seconds = each.speed.tokens_per_s, each.speed.step_seconds
    cells += ["yes", rounded(rate), rounded(rate / each.ranks), f"{each.speed.mfu:.0%}"]
    return [*cells, duration(seconds), duration(each.num_steps * seconds)]


def _time_cells(each: Forecast) -> list[str]:
    shares = [getattr(each.speed, part) / each.speed.step_seconds for part in PARTS]
    return [f"{each.ranks:,}", each.gpu.name, *(f"{100 * share:.1f}" for share in shares)]


def _recompute_cells(each: Forecast) -> list[str]:
    """What each train.recompute needs and brings, the run's own in bold; and the largest micro-batch that fits."""
    cells = [f"{each.ranks:,}", each.gpu.name]
    for policy, (use, speed) in each.policies.items():
        rate = f"{rounded(speed.tokens_per_s / each.ranks):>7}" if each.has_room(use) else "no"
        cell = f"{use.total / GIB:,.0f} {rate}"
        cells.append(f"[bold]{cell}[/]" if policy == each.recompute else cell)
    return [*cells, f"{each.largest_budget:,}" if each.largest_budget else "none"]


def notes(forecasts: Sequence[Forecast], inputs: PlanInputs) -> list[str]:
    """What to change where the run does not fit, and what the predictions assumed."""
    bins, longest = inputs.data.bins_per_step, inputs.workload.lengths.longest
    names = {f"{each.ranks:,} x {each.gpu.name}": each for each in forecasts if not each.fits}
    found = [f"{name}: data.token_budget up to {each.largest_budget:,} fits" for name, each in names.items()
             if each.largest_budget >= longest]  # fmt: skip
    if hopeless := [name for name, each in names.items() if each.largest_budget < longest]:
        found.append(f"{', '.join(hopeless)}: no token_budget that holds the longest sequence fits; try {SAVINGS}")
    for ranks in sorted({each.ranks for each in forecasts}):
        if inputs.optim.in_backward and ranks > 1:
            found.append(f"optim.in_backward = true needs one process: a run on {ranks:,} GPUs will refuse it")
        if bins % ranks:
            shared = rounded_up(bins, ranks)
            found.append(f"data.bins_per_step = {bins} cannot be shared by {ranks:,} GPUs: predicted with {shared:,}")
    return found


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], gap: int = 2) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in ("card", "fits", "recompute") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """0.35 s, 12 s, 7 min, 3.4 h, 2.1 days."""
    for limit, unit, size, digits in ((1, "s", 1, 2), (100, "s", 1, 1), (5400, "min", 60, 0), (172800, "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def rounded(rate: float) -> str:
    """Three digits: a prediction has no more."""
    rate = float(f"{rate:.3g}")
    return f"{rate:,.0f}" if rate < 1e6 else f"{rate / 1e6:,.3g} M"
