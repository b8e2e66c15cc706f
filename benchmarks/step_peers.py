"""The implementations of a step that are compared: ours, transformers (padded, packed, with Liger) and TRL.

    runner = Packed(config, torch.device("cpu"), Peer()); runner.step(); runner.losses()
Every runner takes the conversations of each step from our loader, and uses the same AdamW, clipping and learning rates.
A peer's loss is ours, `sum w * nll / sum |w|` of the step; Liger and TRL have no weights per token and train on the
mean over supervised tokens. Letters: T packed tokens, B conversations of a padded batch, V vocabulary.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import structs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.step_cases import Peer
from ochat.config import Config
from ochat.data.batch import IGNORE_INDEX, PackedBatch
from ochat.distributed import processes
from ochat.model.config import ModelConfig
from ochat.train import build, schedule
from ochat.train.trainer import Trainer

BATCH = 4  # conversations of a padded batch
FLASH = ("flash_attention_3", "flash_attention_2", "flash_attention_4")  # transformers' names, in this order


class Counts(NamedTuple):
    """What a step computes on: real tokens, supervised ones, tokens with padding, sum of squared document lengths."""

    tokens: int
    supervised: int
    padded: int
    square_lengths: int


class Ours:
    """The product's own Trainer, step by step."""

    def __init__(self, config: Config, device: torch.device, peer: Peer) -> None:
        self.trainer = trainer = Trainer(config, processes.start(config.train, config.parallel))
        self.loader = trainer.loader
        self.steps = self.loader.iterate()
        train = trainer.config.train
        self.note = f"kernels {train.kernels}, attention {train.attention}, recompute {train.recompute}"

    def step(self) -> Counts:
        step, batches = next(self.steps)
        self.trainer.step(step, batches)
        return _counts(batches, sum(len(batch.input_ids) for batch in batches))

    def losses(self) -> list[float]:
        """Of the steps since the last call."""
        return [line["loss"] for line in self.trainer.metrics.flush()]


class Transformers:
    """A transformers model in the loop that its users write; subclasses make the batches."""

    otherwise = "flex_attention"  # without a FlashAttention that works: compiled on a GPU (SDPA on a CPU)

    def __init__(self, config: Config, device: torch.device, peer: Peer) -> None:
        self.config, self.device, self.peer = config, device, peer
        self.data = build.open_dataset(config)
        model_config = ModelConfig.load(config.base.path)
        self.loader = build.open_loader(config, self.data, model_config)
        lr, _ = schedule.choose_lr(config.optim.lr, self.loader.stats().supervised_per_step, model_config)
        self.optim = structs.replace(config.optim, lr=lr)
        self.attention = choose_attention(self.device, self.otherwise)
        self.note = f"attention {self.attention}"
        self.model = self.load_model()
        self.optimizer = adamw(self.model, config)
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
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.lr_at(self.steps_done, self.loader.num_steps, self.optim)
        if self.optim.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
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

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of the next step."""
        raise NotImplementedError


class Padded(Transformers):
    """Batches of four conversations in random order, each as long as its longest, through a DataLoader."""

    otherwise = "sdpa"

    @cached_property
    def batches(self) -> Iterator[dict[str, Tensor]]:
        steps = range(self.loader.num_steps)
        batches = [batch for step in steps for batch in padded_batches(self.loader.step(step), step)]
        on_gpu = self.device.type == "cuda"
        return iter(DataLoader(self.data, batch_sampler=batches, collate_fn=pad, pin_memory=on_gpu))  # type: ignore[arg-type]

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        for _ in padded_batches(packed, self.steps_done):
            yield next(self.batches)


class Packed(Transformers):
    """Our bins, without padding, as transformers' packed sequences: positions restart where a document begins."""

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        names = ("input_ids", "position_ids", "labels", "loss_weights")
        for batch in packed:
            yield {name: getattr(batch, name)[None] for name in names}  # (1, T)


class Liger(Packed):
    """transformers, packed, with Liger's RMSNorm, RoPE, SwiGLU and fused head."""

    def load_model(self) -> nn.Module:
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
        return super().load_model()

    def loss(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        labels = batch["labels"].masked_fill(batch["loss_weights"] == 0, IGNORE_INDEX)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        count = sum(each.num_supervised for each in packed)
        targets = {"labels": labels, "shift_labels": labels, "num_items_in_batch": count}
        return self.model(**inputs, **targets, use_cache=False).loss


class Trl(Packed):
    """TRL's SFTTrainer without padding: its collator, its loss and its step, with our AdamW and learning rates."""

    def load_model(self) -> nn.Module:
        trl, model = import_module("trl"), super().load_model()
        is_half = self.config.train.dtype == "bfloat16"
        arguments = trl.SFTConfig(
            output_dir=str(Path(self.config.run.dir)), per_device_train_batch_size=1, padding_free=True,
            gradient_accumulation_steps=self.config.data.bins_per_step, bf16=is_half and self.peer.states == "masters",
            max_length=None, use_cpu=self.device.type == "cpu", gradient_checkpointing=self.peer.recompute,
            dataset_kwargs={"skip_prepare_dataset": True}, report_to=[],
        )  # fmt: skip
        rows = [self.example(batch) for batch in self.loader.step(0)]
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(self.config.base.path)
        data = import_module("datasets").Dataset.from_list(rows)
        self.trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        self.prepared = self.trainer.accelerator.prepare(model)
        return model

    def backward(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        return self.trainer.training_step(self.prepared, batch, sum(each.num_supervised for each in packed))

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        for batch in packed:
            yield self.trainer.data_collator([self.example(batch)])

    def example(self, batch: PackedBatch) -> dict[str, list[int]]:
        """A bin as TRL packs it: labels are not shifted."""
        labels = batch.labels.masked_fill(batch.loss_weights == 0, IGNORE_INDEX).roll(1)
        return {"input_ids": batch.input_ids.tolist(), "labels": labels.tolist(), "seq_lengths": list(batch.lengths)}


RUNNERS: dict[str, type[Ours] | type[Transformers]] = {
    "ours": Ours, "padded": Padded, "packed": Packed, "liger": Liger, "trl": Trl,
}  # fmt: skip
WEIGHTED = ("ours", "padded", "packed")  # those that train on the records' weights, and so the same thing


def choose_attention(device: torch.device, otherwise: str) -> str:
    """transformers' `attn_implementation`: "sdpa" on a CPU, else the first FlashAttention that works, or `otherwise`.

    Packages of FlashAttention share a namespace, so an import proves little: a tiny model is tried.
    """
    if device.type != "cuda":
        return "sdpa"
    return next((name for name in FLASH if is_installed(name) and attention_works(name, device)), otherwise)


def is_installed(name: str) -> bool:
    known = import_module("transformers.utils")
    return getattr(known, f"is_{name.replace('attention', 'attn')}_available", lambda: False)()


def attention_works(name: str, device: torch.device) -> bool:
    """Whether two packed documents go forward and backward; prints why not."""
    transformers = import_module("transformers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    places = torch.arange(32, device=device).repeat(2)[None]  # (1, T)
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**heads, **sizes), dtype=torch.bfloat16, attn_implementation=name
        ).to(device)
        model(input_ids=places, position_ids=places, use_cache=False).logits.sum().backward()
        return bool(torch.stack([p.grad.isfinite().all() for p in model.parameters()]).all())
    except Exception as problem:  # compilers and drivers raise anything
        print(f"transformers' {name} does not work here: {type(problem).__name__}: {problem}", flush=True)
        return False


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
