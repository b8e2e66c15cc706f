"""Tables of what a plan predicts, and the notes that belong to them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ochat.plan.forecast import POLICIES, Forecast, PlanInputs, rounded_up
from ochat.plan.memory import GIB
from ochat.plan.roofline import PARTS

MEMORY_COLUMNS = {
    "state": lambda use: use.masters + use.moments,
    "gradients": lambda use: use.gradients,
    "weights": lambda use: use.weights,
    "activations": lambda use: use.activations,
    "working": lambda use: use.working,
    "allowance": lambda use: use.allowance,
    "total": lambda use: use.total,
}
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


def memory_table(forecasts: Sequence[Forecast], token_budget: int) -> Table:
    """What the memory of one GPU goes to: a line for each number of GPUs and each resolved recompute."""
    table = _table(f"planned memory of a GPU in GiB, token_budget {token_budget:,}", "GPUs", "recompute",
                   *MEMORY_COLUMNS)  # fmt: skip
    table.padding = (0, 1, 0, 0)
    uses = {(each.ranks, each.recompute): each.use for each in forecasts}
    for (ranks, recompute), use in uses.items():
        table.add_row(f"{ranks:,}", recompute, *(f"{part(use) / GIB:,.1f}" for part in MEMORY_COLUMNS.values()))
    return table


def speed_table(forecasts: Sequence[Forecast]) -> Table:
    """Whether the run fits as it is configured, and how fast it would be."""
    table = _table("as configured", "GPUs", "card", "memory", "fits", "tokens/s", "a GPU", "MFU", "a step", "the run")
    for each in forecasts:
        room = f"{each.use.total / GIB:,.0f}/{each.gpu.memory_gib:.0f} GiB"
        rate, step = each.speed.tokens_per_s, each.speed.step_seconds
        speed = rounded(rate), rounded(rate / each.ranks), f"{each.speed.mfu:.0%}", duration(step)
        cells = ("yes", *speed, duration(each.run_seconds)) if each.fits else ("[red]no[/]", *["-"] * 5)
        table.add_row(f"{each.ranks:,}", each.gpu.name, room, *cells)
    return table


def time_table(forecasts: Sequence[Forecast]) -> Table:
    """The share of a step that each part takes."""
    table = _table("a step's time, %", "GPUs", "card", *(TIME_COLUMNS.get(part, part) for part in PARTS))
    table.padding = (0, 1, 0, 0)
    for each in filter(lambda each: each.fits, forecasts):
        shares = [getattr(each.speed, part) / each.speed.step_seconds for part in PARTS]
        table.add_row(f"{each.ranks:,}", each.gpu.name, *(f"{100 * share:.1f}" for share in shares))
    return table


def recompute_table(forecasts: Sequence[Forecast]) -> Table:
    """What each train.recompute needs and brings, the run's own in bold; and the largest micro-batch that fits."""
    table = _table("train.recompute: GiB and tokens/s of a GPU", "GPUs", "card", *POLICIES, "largest token_budget")
    for each in forecasts:
        cells = []
        for policy, (use, speed) in each.policies.items():
            rate = f"{rounded(speed.tokens_per_s / each.ranks):>7}" if each.has_room(use) else "no"
            cell = f"{use.total / GIB:,.0f} {rate}"
            cells.append(f"[bold]{cell}[/]" if policy == each.recompute else cell)
        largest = f"{each.largest_budget:,}" if each.largest_budget else "none"
        table.add_row(f"{each.ranks:,}", each.gpu.name, *cells, largest)
    return table


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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in ("card", "fits", "recompute") else "right", no_wrap=True)
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
