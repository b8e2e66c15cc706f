"""A base without weights, its data, and a Trainer on them: nothing of the model's size is written or read.

world = bare_world.make(case, Path("work"), num_steps=20)
with bare_world.weights_are(bare_world.drawn): trainer = Trainer(config, ranks)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import step_cases
from benchmarks.step_cases import CLASSES, END_OF_TURN, Case, World
from ochat.checkpoint import load as checkpoint
from ochat.model import hf, lora
from ochat.model.transformer import Transformer
from ochat.train import verify


def make(case: Case, folder: Path, num_steps: int) -> World:
    """The folders of a case: config.json, a tokenizer, and enough drawn conversations for `num_steps`."""
    world = World(folder / "base", folder / "data", step_cases.model_config(case), CLASSES, has_weights=False)
    world.base.mkdir(parents=True)
    (world.base / "config.json").write_text(json.dumps(world.model.to_hf()), encoding="utf-8")
    step_cases.write_bytes_tokenizer(world.base, END_OF_TURN)
    step_cases.write_data(world, case, num_steps)
    return world


@contextlib.contextmanager
def weights_are(fill: Callable[[Path, Transformer], Any]) -> Iterator[None]:
    """A Trainer made here fills its model by `fill(base, model)` and expects no files of weights."""
    with contextlib.ExitStack() as stack:
        for module, name in ((hf, "open_tensors"), (verify, "base")):
            stack.enter_context(mock.patch.object(module, name))
        stack.enter_context(mock.patch.object(lora, "base_digest", return_value=""))
        stack.enter_context(mock.patch.object(checkpoint, "load_base", fill))
        yield


def left(base: Path, model: Transformer) -> None:
    """What memory holds."""


@torch.no_grad()
def drawn(base: Path, model: Transformer) -> None:
    """Random as Transformer.initialize has them, drawn on the model's own device."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, model.config.initializer_range)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0 - model.config.norm_offset)
