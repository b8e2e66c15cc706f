"""Describe a run in words, for `ochat plan` and for the start of training."""

from __future__ import annotations

import numpy as np

from ochat.config import DataConfig
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.model.config import ModelConfig
from ochat.plan import tables


def describe(
    loader: Loader, model: ModelConfig, data: DataConfig, *, weights_source: str, lr_reason: str
) -> dict[str, str]:
    """The facts of a run as name -> text; the trainer prints the same before its first step."""
    dataset, stats = loader.dataset, loader.stats()
    flops = model.flops_per_sequence(dataset.lengths, dataset.supervised)[loader.plan(0).indices].sum()
    return {
        "model": f"{model.model_type}, {model.num_parameters():,} parameters",
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(dataset.lengths.max()):,}",
        **describe_sets(loader),
        "classes": _describe_classes(dataset, weights_source),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
        **tables.step_facts(data, stats, float(flops), lr_reason),
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
