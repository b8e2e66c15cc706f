"""A training step of any size without a card and without its memory: fake tensors that have shapes and nothing else.

    step = FakeStep(model_config, Layout(8192, supervised=4096));  step.saved_bytes();  step.peak_bytes()
The real model, the Triton operators (their fake kernels) and torch's varlen attention run; every storage is counted.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import ochat_kernels
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ochat.model import lora
from ochat.model.attention import PackedAttention
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.plan.memory import Layout
from ochat.train.loss import head_loss


class Living(TorchDispatchMode):
    """Bytes of all storages that were made under it and are still held; the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.bytes -= size


class FakeStep:
    """Forward and backward of one process over micro-batches of two documents each, laid out as a plan's Layout."""

    def __init__(self, config: ModelConfig, at: Layout) -> None:
        self.at, self.mode, self.living = at, FakeTensorMode(), Living()
        self.ops = ochat_kernels.load("triton")
        with self.mode, self.living:
            torch.set_default_dtype(torch.bfloat16 if at.lora.rank or at.master_itemsize == 2 else torch.float32)
            try:
                self.model = Transformer(config, self.ops)
            finally:
                torch.set_default_dtype(torch.float32)
            if at.lora.rank:
                lora.attach(self.model, at.lora, (5,))
        self.model.compute_dtype, self.model.recompute = torch.bfloat16, at.recompute

    def forward(self) -> torch.Tensor:
        """The loss of one micro-batch."""
        tokens, cu_seqlens = self.at.token_budget, torch.zeros(3, dtype=torch.int32)
        ids = torch.zeros(tokens, dtype=torch.int64)
        rows = ids[: self.at.supervised]  # a view: nothing to count
        batch: Any = SimpleNamespace(supervised_labels=ids[rows], supervised_weights=torch.zeros(tokens)[rows])
        head = head_loss(self.ops, batch, self.model.head.tokens)
        attend = PackedAttention(cu_seqlens, tokens // 2, "varlen", [tokens // 2] * 2)
        return self.model(ids, ids, attend, head=head, rows=rows).loss_sum

    def saved_bytes(self) -> int:
        """Storages that are there after forward and were not before, the loss apart."""
        with self.mode, self.living:
            before = self.living.bytes
            loss = self.forward()
            assert loss.requires_grad
            return self.living.bytes - before - loss.nbytes

    def peak_bytes(self) -> int:
        """The most that was held at any moment of all micro-batches, moments of AdamW apart; with updates in backward,
        where each gradient goes as soon as it is there."""
        for parameter in self.model.parameters():
            if self.at.micro_batches > 1:
                parameter.grad_dtype = torch.float32
            if self.at.in_backward:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with self.mode, self.living:
            for _ in range(self.at.micro_batches):
                self.forward().backward()
        return self.living.peak
