"""Wrap a model for its devices in this order: recompute, compile, shard.

`parallel.shard` ranks together hold one copy of the model (FSDP2); `parallel.replicate` such groups train in parallel.
A single process is not wrapped. Gradients are summed over all ranks, never averaged: the loss is already divided by the
weight of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch._functorch.config as compiler
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ochat.config import ParallelConfig, TrainConfig
from ochat.distributed.processes import Ranks
from ochat.model import linear
from ochat.model.transformer import Head, Linear, RMSNorm, Transformer


def wrap(model: Transformer, ranks: Ranks, train: TrainConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Set recompute, compile each block, then shard each block and the rest, as configured.

    `model` may be on the meta device. A sharded model computes in `dtype`.
    """
    model.recompute, model.offload_activations = train.recompute, train.offload_activations
    if train.compile:
        # the compiler recomputes elementwise results by itself, and inputs of matmuls too unless banned
        compiler.ban_recompute_materialized_backward = train.recompute != "elementwise"
        model.recompute = train.recompute if train.recompute == "block" else "none"
        for block in model.blocks:
            block.compile()
    if ranks.mesh is not None:
        _shard(model, ranks, parallel, dtype)


@contextmanager
def not_compiled(model: Transformer) -> Iterator[None]:
    """Run the blocks as they are written, inside an evaluation: all blocks share torch's limit of 8 graphs, and those
    without gradients, and one a layer for the KV cache, would use it up, so that training went on uncompiled."""
    compiled = [block._compiled_call_impl for block in model.blocks]
    for block in model.blocks:
        block._compiled_call_impl = None
    try:
        yield
    finally:
        for block, call in zip(model.blocks, compiled, strict=True):
            block._compiled_call_impl = call


def begin_micro_batch(model: Transformer, ranks: Ranks, parallel: ParallelConfig, *, is_last: bool) -> None:
    """Set when a sharded model reduces gradients and frees gathered weights in the next micro-batch; `is_last` of the
    step.

    The head, or the tied embeddings, stay gathered through a step with any `reshard`. Replicas are all-reduced once a
    step, but every time in bfloat16, in which partial sums would be rounded too.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(is_last or parallel.reduce == "micro_batch")
    if parallel.reduce_dtype == "float32":
        model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or _reshards(ranks, parallel))
    for module in (model, model.head):  # the root holds the tied embeddings, else the last norm alone
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(is_last, recurse=False)


def _shard(model: Transformer, ranks: Ranks, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Apply FSDP2 to the embedding, each block, the head, and the root, which holds the last norm. Tied embeddings are
    used at both ends, so they belong to the root.

    Head and root are needed again right after their forward, so they stay gathered. The embedding's backward reads no
    weight.
    """
    mesh = ranks.mesh
    assert mesh is not None
    reduce_dtype = getattr(torch, parallel.reduce_dtype)
    options: dict = {
        "mesh": mesh["shard"] if mesh["replicate"].size() == 1 else mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False),
    }
    if parallel.offload == "all":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    is_tied = model.head.weight is model.embed.weight
    passing = [*model.blocks] if is_tied else [model.embed, *model.blocks]
    staying = [model] if is_tied else [model.head, model]
    for module in passing:
        fully_shard(module, **options, reshard_after_forward=_reshards(ranks, parallel))
    for module in staying:
        fully_shard(module, **options, reshard_after_forward=False)
    if not is_tied:
        model.embed.set_unshard_in_backward(False)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # each gathers the next one's weights before its own forward is queued, so that they overlap even if the host is
    # slower than the device; in backward FSDP2 prefetches one module ahead by itself
    for module, following in pairwise([*passing, *staying[:-1]]):
        module.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


def prepare_weights(
    model: Transformer, ranks: Ranks, train: TrainConfig, parallel: ParallelConfig, *, micro_batches: int
) -> None:
    """For a model in memory: set the dtype of each gradient, and on one process keep copies of the weights in the dtype
    of the computation.

    Gradients are fp32, those of embedding and head always; of a sharded block they have the reduction's dtype, and of
    bf16 masters bf16 where a process has one of `micro_batches` in a step. There are no copies where blocks are
    recomputed, which is done to save memory: each use casts, twice 6 bytes a weight for many tokens.
    """
    blocks = set(model.blocks)
    if ranks.mesh is not None:
        for module in model.modules():
            if isinstance(module, FSDPModule) and not (train.compile and module in blocks):
                dtype = getattr(torch, parallel.reduce_dtype) if module in blocks else torch.float32
                module.register_forward_pre_hook(partial(_set_gradient_dtype, dtype))  # after FSDP's, which gathers
        return
    vocabulary = {model.embed.weight, model.head.weight}
    for parameter in model.parameters():
        if parameter.requires_grad and (micro_batches > 1 or parameter in vocabulary):
            parameter.grad_dtype = torch.float32
    if model.recompute != "block" and not train.compile:
        readers = [module for module in model.modules() if isinstance(module, (Linear, RMSNorm, Head))]
        quantised = {each.weight for each in readers if isinstance(each, Linear) and each.fp8}  # from the masters
        read = (parameter for each in readers for parameter in each.parameters(recurse=False))
        linear.keep_copies((p for p in read if p not in quantised), getattr(torch, train.dtype))


def _set_gradient_dtype(dtype: torch.dtype, module: nn.Module, _: Any) -> None:
    """Have the gradients of gathered weights made and added up in `dtype`: FSDP would take them in the weights' dtype
    and cast them."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):  # gathered
            parameter.grad_dtype = dtype


def _reshards(ranks: Ranks, parallel: ParallelConfig) -> bool:
    """Whether gathered weights are freed after each block; "auto": on CUDA, as a CPU has memory enough."""
    return parallel.reshard == "block" or (parallel.reshard == "auto" and ranks.device.type == "cuda")
