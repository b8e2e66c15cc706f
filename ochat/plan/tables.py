"""What a plan prints: the facts of a run, and tables of memory and speed on named cards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.config import DataConfig
from ochat.data.loader import LoaderStats
from ochat.plan import plan_scaling
from ochat.plan.forecast import (
    POLICIES,
    Forecast,
    Run,
    forecast,
    rounded_up,
)
from ochat.plan.format import duration, rounded
from ochat.plan.gpus import CARDS
from ochat.plan.memory import GIB, MemoryUse

LOW_FILL = " (low: the data fills few bins; lower data.bins_per_step or data.token_budget)"
PREDICTED = (
    "Predicted, not measured: FLOPs and bytes over what the cards reach, with FlashAttention-2, which torch's varlen "
    "attention runs (formulas: ochat/plan/memory.py, speed.py). Kernels that fall short make it slower."
)
NO_SPEED = "train.dtype = float32: no card is predicted; the rates that predictions rest on are those of bfloat16"
MEMORY_COLUMNS = {
    "state": lambda use: use.masters + use.moments,
    "gradients": lambda use: use.gradients,
    "weights": lambda use: use.weights,
    "activations": lambda use: use.activations,
    "passing": lambda use: use.working,
    "allowance": lambda use: use.allowance,
    "together": lambda use: use.total,
}
MEMORY_LEGEND = (
    "state: masters and both moments; weights: as the products read them; passing: the head's logits, gradients "
    "on their way; allowance: assumed for CUDA, NCCL and fragmentation"
)


def facts(title: str, values: dict[str, str]) -> Table:
    """Name and text, a line each."""
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a long path is shown whole
    for name, value in values.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    return table


def step_facts(data: DataConfig, stats: LoaderStats, flops: float, lr_reason: str) -> dict[str, str]:
    """The facts that follow from the packing; `flops`: of an epoch."""
    return {
        "steps": f"{stats.num_steps:,} of {_epochs(stats.steps_per_epoch)}",
        "step": f"{data.bins_per_step} bins of {data.token_budget:,} tokens: "
        f"{stats.tokens_per_step:,.0f} real, {stats.supervised_per_step:,.0f} supervised on average",
        "packing": f"fill {stats.fill:.2%}{LOW_FILL * (stats.fill < 0.5)}; work of a step's bins, max over mean: "
        f"{stats.imbalance_mean:.3f} on average, {stats.imbalance_worst:.3f} at worst",
        "work": f"{flops / stats.num_tokens:.3g} FLOPs a token, {flops:.3g} an epoch",
        "learning rate": lr_reason,
    }


def show(run: Run, options: argparse.Namespace, console: Console) -> None:
    """Memory by number of GPUs, speed by card, and what to set."""
    if run.config.train.dtype != "bfloat16":
        console.print(f"\n{NO_SPEED}", soft_wrap=True)
        return
    few = (1,) if run.config.optim.in_backward else (1, 8)  # in backward one process updates
    gpus = (options.gpus,) if options.gpus else (few if options.nodes == 1 else (8,))
    cards = [CARDS[options.card]] if options.card else list(CARDS.values())
    forecasts = [forecast(run, card, gpus=count, nodes=options.nodes) for count in gpus for card in cards]
    data, recompute = run.config.data, " or ".join(dict.fromkeys(each.recompute for each in forecasts))
    console.print(f"\n[dim]{escape(PREDICTED)}[/]\n")
    title = f"memory of a GPU in GiB, token_budget {data.token_budget:,}, recompute {recompute}"
    console.print(memory_table(title, {(each.ranks, each.recompute): each.use for each in forecasts}))
    console.print(f"[dim]{MEMORY_LEGEND}[/]\n")
    console.print(speed_table(forecasts), "", policy_table(forecasts), "", advice_table(forecasts), sep="\n")
    if options.gpus is None and options.nodes == 1 and not run.config.optim.in_backward:
        rows = [row for card in cards for row in plan_scaling.scale(run, card)]
        if rows:
            console.print("", plan_scaling.table(rows), f"[dim]{plan_scaling.LEGEND}[/]\n", sep="\n")
    for advice in dict.fromkeys(each.advice for each in forecasts):
        where = [f"{each.ranks:,} x {each.card.name}" for each in forecasts if each.advice == advice]
        console.print(f"[dim]{escape(', '.join(where))}:[/] {escape(advice)}")
    if run.config.optim.in_backward and max(each.ranks for each in forecasts) > 1:
        console.print("[yellow]note[/] optim.in_backward = true needs one process: a run on more will refuse it")
    for ranks in sorted({each.ranks for each in forecasts}):
        if data.bins_per_step % ranks:
            bins = rounded_up(data.bins_per_step, ranks)
            console.print(
                f"[yellow]note[/] data.bins_per_step = {data.bins_per_step} cannot be shared by {ranks} GPUs: "
                f"predicted with {bins}"
            )  # fmt: skip


def memory_table(title: str, uses: dict[tuple[int, str], MemoryUse]) -> Table:
    """What the memory of one GPU goes to, a line for each number of GPUs and what is recomputed there."""
    shows_policy = len({ranks for ranks, _ in uses}) < len(uses)
    table = _table(title, "GPUs", *MEMORY_COLUMNS)
    table.padding = (0, 1, 0, 0)
    for (ranks, recompute), use in uses.items():
        who = f"{ranks:,} {recompute}" if shows_policy else f"{ranks:,}"
        table.add_row(who, *(f"{part(use) / GIB:,.1f}" for part in MEMORY_COLUMNS.values()))
    return table


def policy_table(forecasts: Sequence[Forecast]) -> Table:
    """What each train.recompute needs and brings, a line for each number of GPUs and card."""
    table = _table("train.recompute: GiB and tokens/s of a GPU", "GPUs", "card", *POLICIES)
    for each in forecasts:
        cells = []
        for policy, (use, rate) in each.policies.items():
            cell = f"{use.total / GIB:,.0f} no" if not each.has_room(use) else (
                f"{use.total / GIB:,.0f} {rounded(rate.tokens_per_s / each.ranks):>7}"
            )  # fmt: skip
            cells.append(f"[bold]{cell}[/]" if policy == each.recompute else cell)
        table.add_row(f"{each.ranks:,}", each.card.name, *cells)
    return table


def speed_table(forecasts: Sequence[Forecast]) -> Table:
    """Whether the run fits as it is configured, and how fast it would be."""
    table = _table("as configured", "GPUs", "card", "memory", "fits", "tokens/s", "a GPU", "MFU", "a step", "the run")
    for each in forecasts:
        room = f"{each.use.total / GIB:,.0f}/{each.card.memory_gib:.0f} GiB"
        if not each.fits:
            table.add_row(f"{each.ranks:,}", each.card.name, room, "[red]no[/]", *["-"] * 5)
            continue
        rate, step = each.speed.tokens_per_s, each.speed.step_seconds
        table.add_row(
            f"{each.ranks:,}", each.card.name, room, "yes", rounded(rate), rounded(rate / each.ranks),
            f"{each.speed.mfu:.0%}", duration(step), duration(each.run_seconds),
        )  # fmt: skip
    return table


def advice_table(forecasts: Sequence[Forecast]) -> Table:
    """The largest budget that fits, and the one to set."""
    table = _table("micro-batches", "GPUs", "card", "largest token_budget", "recommended", "with bins_per_step")
    for each in forecasts:
        largest = f"{each.largest_budget:,}" if each.largest_budget else "none"
        best = each.best
        values = (f"{best.token_budget:,}", f"{best.bins_per_step:,}") if best else ("-", "-")
        table.add_row(f"{each.ranks:,}", each.card.name, largest, *values)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in ("card", "fits") else "right", no_wrap=True)
    return table


def _epochs(steps_per_epoch: Sequence[int]) -> str:
    shown = ", ".join(f"{steps:,}" for steps in steps_per_epoch[:8]) + " ..." * (len(steps_per_epoch) > 8)
    return f"{sum(steps_per_epoch):,} in {len(steps_per_epoch)} epoch{'s' * (len(steps_per_epoch) > 1)} ({shown})"
