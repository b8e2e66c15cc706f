"""Describe a run in words, as name -> text, for `ochat plan` and for the start of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ochat.config import DataConfig
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader, LoaderStats
from ochat.model.config import ModelConfig
from ochat.plan.lengths import LengthCounts

LOW_FILL = " (low: the data fills few bins; lower data.bins_per_step or data.token_budget)"


def describe(
    loader: Loader, model: ModelConfig, data: DataConfig, *, weights_source: str, lr_reason: str
) -> dict[str, str]:
    """All facts of a run; `ochat plan` prints the same as the trainer before its first step."""
    dataset, stats = loader.dataset, loader.stats()
    flops = float(model.flops_per_sequence(dataset.lengths, dataset.supervised)[loader.plan(0).indices].sum())
    return {
        "model": describe_model(model),
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(dataset.lengths.max()):,}",
        **describe_sets(loader),
        "classes": _describe_classes(dataset, weights_source),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
        **describe_steps(stats, data, flops, lr_reason),
    }


def describe_model(model: ModelConfig) -> str:
    """Type and size."""
    return f"{model.model_type}, {model.num_parameters():,} parameters"


def describe_steps(stats: LoaderStats, data: DataConfig, flops: float, lr_reason: str) -> dict[str, str]:
    """Steps, packing, work and learning rate; `flops`: of an epoch."""
    epochs = stats.steps_per_epoch
    each = ", ".join(f"{steps:,}" for steps in epochs[:8]) + " ..." * (len(epochs) > 8)
    return {
        "steps": f"{stats.num_steps:,} of {sum(epochs):,} in {len(epochs)} epoch{'s' * (len(epochs) > 1)} ({each})",
        "step": f"{data.bins_per_step} bins of {data.token_budget:,} tokens: "
        f"{stats.tokens_per_step:,.0f} real, {stats.supervised_per_step:,.0f} supervised on average",
        "packing": f"fill {stats.fill:.2%}{LOW_FILL * (stats.fill < 0.5)}; work of a step's bins, max over mean: "
        f"{stats.imbalance_mean:.3f} on average, {stats.imbalance_worst:.3f} at worst",
        "work": f"{flops / stats.num_tokens:.3g} FLOPs a token, {flops:.3g} an epoch",
        "learning rate": lr_reason,
    }


def describe_sets(loader: Loader) -> dict[str, str]:
    """What the first epoch takes of each set of a mixture, as name -> text; nothing for a single data set."""
    if loader.mixture is None:
        return {}
    taken, facts = loader.mixture(0), {}
    for name, part in loader.dataset.sets.items():
        lengths = loader.dataset.lengths[taken[(part.start <= taken) & (taken < part.stop)]]
        total = loader.mixture.totals[name]
        facts[f"set {name}"] = (
            f"{part.stop - part.start:,} conversations, {total:,} tokens; an epoch takes {len(lengths):,}, "
            f"{lengths.sum():,} tokens: {loader.mixture.budgets[name] / total:.3g} passes"
        )
    return facts


def _describe_classes(dataset: TokenDataset, weights_source: str) -> str:
    """How many conversations each class has and what they weigh; and a note where all classes weigh the same."""
    counts = np.bincount(dataset.class_ids, minlength=len(dataset.class_names))
    found = [(name, n, dataset.mean_weight(name)) for name, n in zip(dataset.class_names, counts, strict=True) if n]
    weights = [weight for *_, weight in found]
    described = ", ".join(f"{name or '(none)'} {n:,} (mean weight {weight:.4g})" for name, n, weight in found)
    if weights_source != "none" and len(found) > 1 and np.allclose(weights, weights[0]):
        described += "; all weigh the same, no reward tells them apart: give each one, [classes.NAME] reward = ..."
    return described


def data_notes(prepared: Sequence[tuple[object, dict]]) -> list[str]:
    """Conversations that prepare truncated or left out, of each data set: (folder, manifest)."""
    return [
        f"{count:,} conversations{f' of {folder}' if len(prepared) > 1 else ''} were longer than the context of "
        f"{manifest['context']:,} tokens and were {what} by prepare"
        for folder, manifest in prepared
        for key, what in (("truncated", "cut"), ("too_long", "left out"))
        if (count := manifest.get("counts", {}).get(key))
    ]


def length_notes(counts: LengthCounts, budget: int, context: int) -> list[str]:
    """Sequences longer than data.token_budget, or with positions that the base model was not trained on."""
    lost = counts.num_tokens - counts.cut(budget).num_tokens
    limits = {
        f"data.token_budget = {budget:,}: planned as cut there, which loses {lost:,} tokens "
        f"({lost / counts.num_tokens:.2%}); training refuses them, so raise the budget, or prepare with a smaller "
        "--context": budget,
        f"the base model's context of {context:,} tokens (max_position_embeddings), up to {counts.longest:,}": context,
    }
    return [
        f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than {text}"
        for text, limit in limits.items()
        if (over := counts.over(limit))
    ]
