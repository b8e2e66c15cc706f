"""What a configuration means for the data: the weighted data set, the loader that cuts it into steps, the learning
rate.

Shared by the trainer and by `ochat plan`, so that a plan shows exactly what a run will do.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import numpy as np
import torch

from ochat.config import Config
from ochat.console import waiting
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.data.mixture import Mixture
from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.text.template import Template
from ochat.train import schedule
from ochat.train.schedule import LearningRate


def open_data(config: Config) -> TokenDataset:
    """The prepared data that is trained on, one set or several, with the configuration's weights and selection."""
    return TokenDataset(
        {name: share.path for name, share in config.data.mix.items()} or config.data.path,
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
    """The steps of the run; the bins of a step are levelled by the model's FLOPs.

    Raises: ConfigError where nothing is supervised, or the bins do not fit the ranks.
    """
    if not data.supervised.sum():
        raise ConfigError(f"{data.path}: no token has a weight other than 0; look at [classes] and weights.source")
    for section, names in (("[classes]", config.classes), ("samples.conditions", config.samples.conditions)):
        for name in names:
            if name and name not in data.class_names:
                raise ConfigError(
                    f"{section} names {name!r}; the classes of {data.path} are {', '.join(data.class_names)}"
                )
    with nullcontext() if rank else waiting("packing the conversations into steps"):
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
            pin=pad and torch.cuda.is_available(),
            mixture=Mixture(data, config.data.mix, config.run.seed) if config.data.mix else None,
            costs=model.flops_per_sequence(data.lengths, data.supervised).astype(
                np.float32
            ),  # of many sequences, each rank holds them
        )


def open_eval_loader(config: Config, data: TokenDataset, *, rank: int = 0, world: int = 1, pad: bool = False) -> Loader:
    """One pass over held-out data, one bin per rank at a time; the order never changes."""
    pin = pad and torch.cuda.is_available()
    budget = config.data.token_budget
    return Loader(data, token_budget=budget, bins_per_step=world, rank=rank, world=world, pad=pad, pin=pin)


def served_template(data: TokenDataset) -> Template:
    """The data's template; a default condition that no trained class has gives way to the class of the largest weight.

    A class's weight is the mean |weight| of the supervised tokens in the first conversations of it.
    """
    trained = [data.class_names[i] for i in np.unique(data.class_ids)]
    if data.template.default_condition in trained:
        return data.template
    weights = {name: data.mean_weight(name) for name in trained}
    return dataclasses.replace(data.template, default_condition=max(weights, key=lambda name: weights[name]))


def choose_lr(config: Config, loader: Loader, model: ModelConfig) -> LearningRate:
    """The configured peak learning rate, or what "auto" makes of the supervised tokens of a step."""
    return schedule.choose_lr(
        config.optim.lr,
        supervised_tokens_per_step=loader.stats().supervised_per_step,
        model_type=model.model_type,
        vocab_size=model.vocab_size,
        lora=config.lora.rank > 0,
    )
