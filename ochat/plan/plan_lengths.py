"""A plan from the lengths of sequences alone, before there is a data set: `ochat plan run.toml --lengths FILE.npy`.

The file is mapped and its sequences are packed as a run would pack them; what is supervised is an assumption.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ochat.config import Config
from ochat.data.loader import LoaderStats
from ochat.model.config import ModelConfig
from ochat.packing import multipack
from ochat.plan import tables
from ochat.plan.lengths import LengthCounts


def pack(
    config: Config, model: ModelConfig, lengths: NDArray, counts: LengthCounts, supervised: float, console: Console
) -> LoaderStats:
    """What the packing of an epoch gives, with sequences longer than a bin cut to it; other epochs differ by next to
    nothing and are taken to be the same. A spinner and the time show on a terminal."""
    budget, bins = config.data.token_budget, config.data.bins_per_step
    if counts.longest > budget:
        lengths, counts = np.minimum(lengths, budget), counts.cut(budget)
    costs = _cost_of_length(model, counts.longest, supervised)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(f"packing {len(lengths):,} sequences", total=None)
        plan = multipack.plan(
            lengths, token_budget=budget, bins_per_step=bins, seed=config.run.seed, epoch=0, costs=costs[lengths]
        )
    imbalance = plan.cost_imbalance()
    steps = plan.num_steps * config.data.epochs
    return LoaderStats(
        num_sequences=len(lengths),
        num_tokens=counts.num_tokens,
        num_supervised=round(supervised * counts.num_tokens),
        num_steps=min(steps, config.data.max_steps or steps),
        steps_per_epoch=(plan.num_steps,) * config.data.epochs,
        fill=plan.efficiency(),
        imbalance_mean=float(imbalance.mean()) if len(imbalance) else 1.0,
        imbalance_worst=float(imbalance.max()) if len(imbalance) else 1.0,
    )


def describe(
    config: Config,
    model: ModelConfig,
    stats: LoaderStats,
    counts: LengthCounts,
    options: argparse.Namespace,
    lr_reason: str,
) -> dict[str, str]:
    """The facts of a run on such lengths, as name -> text."""
    costs = _cost_of_length(model, counts.longest, options.supervised).astype(np.float64)
    return {
        "model": f"{model.model_type}, {model.num_parameters():,} parameters",
        "data": f"{stats.num_sequences:,} sequences of {options.lengths}, {stats.num_tokens:,} tokens",
        "supervised": f"{options.supervised:.0%} of the tokens: assumed (--supervised)",
        **tables.step_facts(config.data, stats, float(counts.counts @ costs), lr_reason),
    }


def notes(config: Config, model: ModelConfig, counts: LengthCounts) -> list[str]:
    """Sequences that would not reach training whole."""
    budget, found = config.data.token_budget, []
    if over := counts.over(budget):
        lost = counts.num_tokens - counts.cut(budget).num_tokens
        found.append(
            f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than data.token_budget = {budget:,}: "
            f"planned as cut there, which loses {lost:,} tokens ({lost / counts.num_tokens:.2%}); training refuses "
            "them, so raise the budget, or prepare with a smaller --context"
        )
    return found + beyond_context(model, counts)


def beyond_context(model: ModelConfig, counts: LengthCounts) -> list[str]:
    """Sequences with positions that the base model was not trained on."""
    context = model.max_position_embeddings
    if not (over := counts.over(context)):
        return []
    return [
        f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than the base model's context of "
        f"{context:,} tokens (max_position_embeddings), up to {counts.longest:,}"
    ]


def _cost_of_length(model: ModelConfig, longest: int, supervised: float) -> NDArray[np.float32]:
    """(longest + 1,) training FLOPs of a sequence by its length, in half of float64's memory."""
    n = np.arange(longest + 1, dtype=np.float64)
    a_token = model.flops_per_step(1, 0, 0) + supervised * model.flops_per_step(0, 0, 1)
    return (a_token * n + model.flops_per_step(0, 1, 0) * n**2).astype(np.float32)
