"""Whose steps are compared: ours, and transformers over padded and over packed batches of the same conversations.

    runner = Packed(config, torch.device("cpu"), Peer()); runner.step(); runner.losses()

Every runner takes the conversations of each step from our loader. A peer's loss is ours, `sum w * nll / sum |w|` of the
step, with the same AdamW, clipping and learning rates.
Letters: T packed tokens, B conversations of a padded batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import peer_attention
from ochat.config import Config
from ochat.data.batch import IGNORE_INDEX, PackedBatch
from ochat.distributed import processes
from ochat.model.config import ModelConfig
from ochat.train import inputs, schedule
from ochat.train.trainer import Trainer

BATCH = 4  # conversations of a padded batch


class Counts(NamedTuple):
    """What a step computes on: real tokens, supervised ones, tokens with padding, squared lengths of the documents."""

    tokens: int
    supervised: int
    padded: int
    square_lengths: int


@dataclass(frozen=True)
class Peer:
    """How a peer keeps its state."""

    states: str = "masters"  # fp32 parameters and moments, products in bf16 by autocast; or "bf16", all of it
    recompute: bool = False  # transformers' gradient checkpointing


class Ours:
    """The product's own Trainer, step by step."""

    def __init__(self, config: Config, device: torch.device, peer: Peer) -> None:
        self.trainer = trainer = Trainer(config, processes.start(config.train, config.parallel))
        self.loader = trainer.loader
        self.steps = self.loader.iterate()
        self.note = f"kernels {trainer.kernels}, attention {trainer.backend}, recompute {trainer.model.recompute}"

    def step(self) -> Counts:
        step, batches = next(self.steps)
        self.trainer.step(step, batches)
        return _counts(batches, sum(len(batch.input_ids) for batch in batches))

    def losses(self) -> list[float]:
        """Of the steps since the last call."""
        return [line["loss"] for line in self.trainer.journal.flush()]


class Transformers:
    """A transformers model in the loop that its users write; the subclasses make the batches."""

    def __init__(self, config: Config, device: torch.device, peer: Peer) -> None:
        self.config, self.device, self.peer = config, device, peer
        self.data = inputs.open_data(config)
        model_config = ModelConfig.load(config.base.path)
        self.loader = inputs.open_loader(config, self.data, model_config)
        self.lr = inputs.choose_lr(config, self.loader, model_config).value
        self.attention = self.choose_attention()
        self.note = f"attention {self.attention}"
        self.model = self.load_model()
        self.optimizer = adamw(self.model, config)
        self.batches = self.micro_batches()
        self.steps_done, self.done = 0, []

    def step(self) -> Counts:
        """One optimizer step over the conversations of ours."""
        packed = self.loader.step(self.steps_done)
        total, padded = torch.zeros((), device=self.device), 0
        for batch in self.of_step(packed):
            total += self.backward(batch, packed)
            padded += batch["input_ids"].numel()
        self.update()
        self.done.append(total)
        self.steps_done += 1
        return _counts(packed, padded)

    def losses(self) -> list[float]:
        """Of the steps since the last call."""
        values, self.done = [float(loss) for loss in self.done], []
        return values

    def update(self) -> None:
        """Clipping and AdamW at the step's learning rate."""
        options = self.config.optim
        ratios = {"warmup_ratio": options.warmup_ratio, "min_lr_ratio": options.min_lr_ratio}
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * schedule.factor(self.steps_done, self.loader.num_steps, **ratios)
        if options.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        """Adds the batch's gradients; its share of the step's loss, () fp32."""
        with self.autocast():
            loss = self.loss({name: x.to(self.device, non_blocking=True) for name, x in batch.items()}, packed)
        loss.backward()
        return loss.detach()

    def loss(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        """The same, with its graph; the batch on the device."""
        labels, weights = batch.pop("labels"), batch.pop("loss_weights")
        logits = self.model(**batch, use_cache=False).logits.float()  # (B, T, V)
        nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return (nll * weights.flatten()).sum() / sum(each.weight_sum for each in packed)

    def autocast(self) -> Any:
        if self.peer.states == "bf16" or self.config.train.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def load_model(self) -> nn.Module:
        transformers = import_module("transformers")
        dtype = torch.bfloat16 if self.peer.states == "bf16" else torch.float32
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.config.base.path, dtype=dtype, attn_implementation=self.attention
        )
        model.to(self.device).train()
        if self.peer.recompute:
            model.gradient_checkpointing_enable()
        return model

    def choose_attention(self) -> str:
        raise NotImplementedError

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of all steps, in order."""
        raise NotImplementedError

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        """Those of the next step."""
        raise NotImplementedError


class Padded(Transformers):
    """Batches of four conversations in random order, each as long as its longest, through a DataLoader."""

    def choose_attention(self) -> str:
        return peer_attention.choose(self.device, otherwise="sdpa")

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        steps = range(self.loader.num_steps)
        batches = [batch for step in steps for batch in padded_batches(self.loader.step(step), step)]
        on_card = self.device.type == "cuda"
        return iter(DataLoader(self.data, batch_sampler=batches, collate_fn=pad, pin_memory=on_card))  # type: ignore[arg-type]

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        for _ in padded_batches(packed, self.steps_done):
            yield next(self.batches)


class Packed(Transformers):
    """Our bins, without padding, as transformers' packed sequences: positions restart where a document begins."""

    def choose_attention(self) -> str:
        """A FlashAttention that works; else what masks documents: compiled on a card, SDPA on a CPU."""
        return peer_attention.choose(self.device, otherwise="flex_attention")

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        return iter(())

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        names = ("input_ids", "position_ids", "labels", "loss_weights")
        for batch in packed:
            yield {name: getattr(batch, name)[None] for name in names}  # (1, T)


def padded_batches(packed: list[PackedBatch], step: int) -> list[list[int]]:
    """The conversations of a step in batches of BATCH, in an order drawn from the step's number."""
    order = [index for batch in packed for index in batch.sequences]
    random.Random(step).shuffle(order)
    return [order[i : i + BATCH] for i in range(0, len(order), BATCH)]


def pad(examples: list[Any]) -> dict[str, Tensor]:
    """(B, longest) tensors of Examples; labels and weights shifted, as ours are."""
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels, weights = np.full(shape, IGNORE_INDEX, np.int64), np.zeros(shape, np.float32)
    for i, example in enumerate(examples):
        length = len(example.input_ids)
        ids[i, :length], mask[i, :length] = example.input_ids, 1
        labels[i, : length - 1], weights[i, : length - 1] = example.input_ids[1:], example.loss_weights[1:]
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels, "loss_weights": weights}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """torch's fused AdamW with our settings: decay on matrices alone."""
    parameters, options = list(model.parameters()), config.optim
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=True)


def _counts(batches: list[PackedBatch], padded: int) -> Counts:
    return Counts(
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_supervised for batch in batches),
        padded,
        sum(batch.sum_len_sq for batch in batches),
    )
