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
    steps = describe_steps(loader.stats(), data, epoch_flops(loader, model), lr_reason)
    return describe_data(loader, model, weights_source=weights_source) | steps


def describe_data(loader: Loader, model: ModelConfig, *, weights_source: str) -> dict[str, str]:
    """The facts of the model and the data."""
    dataset, stats = loader.dataset, loader.stats()
    return {
        "model": describe_model(model),
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(dataset.lengths.max()):,}",
        **describe_sets(loader),
        "classes": _describe_classes(dataset, weights_source),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
    }


def describe_lengths(stats: LoaderStats, model: ModelConfig, path: str, supervised: float) -> dict[str, str]:
    """The facts of the model and of sequences of which only the lengths are known."""
    return {
        "model": describe_model(model),
        "data": f"{stats.num_sequences:,} sequences of {path}, {stats.num_tokens:,} tokens",
        "supervised": f"{supervised:.0%} of the tokens: assumed (--supervised)",
    }


def epoch_flops(loader: Loader, model: ModelConfig) -> float:
    """FLOPs of the first epoch."""
    dataset = loader.dataset
    return float(model.flops_per_sequence(dataset.lengths, dataset.supervised)[loader.plan(0).indices].sum())


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
    weights = {name: dataset.mean_weight(name) for name, n in zip(dataset.class_names, counts, strict=True) if n}
    described = ", ".join(
        f"{name or '(none)'} {counts[dataset.class_names.index(name)]:,} (mean weight {weight:.4g})"
        for name, weight in weights.items()
    )
    is_asked_for = weights_source == "none"
    if is_asked_for or len(weights) < 2 or not np.allclose(list(weights.values()), next(iter(weights.values()))):
        return described
    return f"{described}; all weigh the same, no reward tells them apart: give each one, [classes.NAME] reward = ..."


def data_notes(prepared: Sequence[tuple[object, dict]]) -> list[str]:
    """Conversations that prepare truncated or left out, of each data set: (folder, manifest)."""
    return [
        f"{count:,} conversations{f' of {folder}' if len(prepared) > 1 else ''} were longer than the context of "
        f"{manifest['context']:,} tokens and were {what} by prepare"
        for folder, manifest in prepared
        for key, what in (("truncated", "cut"), ("too_long", "left out"))
        if (count := manifest.get("counts", {}).get(key))
    ]


def budget_notes(counts: LengthCounts, budget: int) -> list[str]:
    """Sequences longer than data.token_budget."""
    if not (over := counts.over(budget)):
        return []
    lost = counts.num_tokens - counts.cut(budget).num_tokens
    return [
        f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than data.token_budget = {budget:,}: "
        f"planned as cut there, which loses {lost:,} tokens ({lost / counts.num_tokens:.2%}); training refuses "
        "them, so raise the budget, or prepare with a smaller --context"
    ]


def context_notes(counts: LengthCounts, context: int) -> list[str]:
    """Sequences with positions that the base model was not trained on."""
    if not (over := counts.over(context)):
        return []
    return [
        f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than the base model's context of "
        f"{context:,} tokens (max_position_embeddings), up to {counts.longest:,}"
    ]
