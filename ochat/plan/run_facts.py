"""Describes a run in words, for `ochat plan` and for the start of training."""

from __future__ import annotations

import numpy as np

from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.model.config import ModelConfig
from ochat.plan import tables
from ochat.train import inputs


def describe(config: Config, loader: Loader, model: ModelConfig) -> dict[str, str]:
    """The facts of a run as name -> text; the trainer prints the same before its first step."""
    data, stats = loader.dataset, loader.stats()
    flops = inputs.sequence_flops(data, model)[loader.plan(0).indices].sum()
    return {
        "model": f"{model.model_type}, {model.num_parameters():,} parameters",
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(data.lengths.max()):,}",
        **inputs.describe_sets(loader),
        "classes": _describe_classes(config, data),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
        **tables.step_facts(config, stats, float(flops), inputs.choose_lr(config, loader, model).reason),
    }


def _describe_classes(config: Config, data: TokenDataset) -> str:
    """How many conversations each class has and what they weigh; and where no reward tells classes apart, that."""
    counts = np.bincount(data.class_ids, minlength=len(data.class_names))
    weights = {name: inputs.mean_weight(data, name) for name, n in zip(data.class_names, counts, strict=True) if n}
    described = ", ".join(
        f"{name or '(none)'} {counts[data.class_names.index(name)]:,} (mean weight {weight:.4g})"
        for name, weight in weights.items()
    )
    is_said = config.weights.source == "none"  # that it is without reward
    if is_said or len(weights) < 2 or not np.allclose(list(weights.values()), next(iter(weights.values()))):
        return described
    return f"{described}; all weigh the same, no reward tells them apart: give each one, [classes.NAME] reward = ..."
