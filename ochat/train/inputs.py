"""What a configuration means for the data: the weighted data set, the loader that cuts it into steps, the learning
rate.

Shared by the trainer and by `ochat plan`, so that a plan shows exactly what a run will do.
"""

from __future__ import annotations

import numpy as np

from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.model.config import ModelConfig
from ochat.train import schedule
from ochat.train.schedule import LearningRate


def open_data(config: Config) -> TokenDataset:
    """The prepared data set that is trained on, with the configuration's weights and selection."""
    return TokenDataset(
        config.data.path,
        classes=config.classes,
        weights=config.weights,
        only_class=config.data.only_class,
        subsample=config.data.subsample,
        seed=config.run.seed,
    )


def open_eval_data(config: Config) -> TokenDataset:
    """The held-out data set with the configuration's weights, whole: a class that is not trained on is measured too."""
    return TokenDataset(config.data.eval_path, classes=config.classes, weights=config.weights)


def open_loader(
    config: Config, data: TokenDataset, model: ModelConfig, *, rank: int = 0, world: int = 1, pad: bool = False
) -> Loader:
    """The steps of the run; the bins of a step are levelled by the model's FLOPs."""
    return Loader(
        data,
        token_budget=config.data.token_budget,
        bins_per_step=config.data.bins_per_step,
        seed=config.run.seed,
        epochs=config.data.epochs,
        max_steps=config.data.max_steps,
        rank=rank,
        world=world,
        pad=pad,
        costs=sequence_flops(data, model),
    )


def open_eval_loader(config: Config, data: TokenDataset, *, rank: int = 0, world: int = 1, pad: bool = False) -> Loader:
    """One pass over held-out data, one bin per rank at a time; the order never changes."""
    return Loader(data, token_budget=config.data.token_budget, bins_per_step=world, rank=rank, world=world, pad=pad)


def choose_lr(config: Config, loader: Loader, model: ModelConfig) -> LearningRate:
    """The configured peak learning rate, or what "auto" makes of the supervised tokens of a step."""
    return schedule.choose_lr(
        config.optim.lr,
        supervised_tokens_per_step=loader.stats().supervised_per_step,
        model_type=model.model_type,
        vocab_size=model.vocab_size,
    )


def sequence_flops(data: TokenDataset, model: ModelConfig) -> np.ndarray:
    """(S,) float64: training FLOPs of each sequence, its head counted for supervised tokens only."""
    linear, head = model.flops_per_step(1, 0, 0), model.flops_per_step(0, 0, 1)
    square = model.flops_per_step(0, 1, 0)
    lengths = data.lengths.astype(np.float64)
    return linear * lengths + square * lengths**2 + head * data.supervised
