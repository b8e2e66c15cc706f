"""Processes, devices, and the order in which a model is wrapped: recompute, compile, shard.

Started by torchrun, every process is a rank; alone, there is one rank and no wrapper. `shard` ranks hold one copy of
the model between them (FSDP2), `replicate` such groups work side by side. Gradients are summed over all ranks, never
averaged: the loss is already divided by the weight of the whole step.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch._functorch.config as compiler
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from ochat.config import ParallelConfig, TrainConfig
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.model.transformer import Transformer


def wrap(model: Transformer, ranks: Ranks, train: TrainConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Applies what the configuration asks for, in this order: recompute, compile each block, shard each block and the
    rest.

    `model` may be on the meta device. A sharded model computes in `dtype`. Raises: ConfigError for weights in host
    memory without a wrapper that brings them.
    """
    model.recompute, model.offload_activations = train.recompute, train.offload_activations
    if train.compile:
        # a compiler makes elementwise results again itself, as inputs of products too when it may
        compiler.ban_recompute_materialized_backward = train.recompute != "elementwise"
        model.recompute = train.recompute if train.recompute == "block" else "none"
        for block in model.blocks:
            block.compile()
    if ranks.mesh is not None:
        _shard(model, ranks, parallel, dtype)
    elif parallel.offload == "all":
        raise ConfigError(
            "parallel.offload = 'all' needs more than one process; on one, 'optimizer' keeps the moments in host memory"
        )


def begin_micro_batch(model: Transformer, ranks: Ranks, parallel: ParallelConfig, *, is_last: bool) -> None:
    """What a sharded model does in the next forward and backward; `is_last` of the step, which ends what lasts a step.

    The head, or the tied embeddings, stay gathered through a step whatever `reshard` says. Replicas are summed once a
    step; but in bfloat16 each time, because the partial sums would be of that type too.
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
    """FSDP2 around the embedding, each block, the head, and what is left, the last norm. Tied embeddings are read at
    both ends, so they are the root's too.

    The head and the root are needed again right after their forward: they stay. The embedding's backward reads no
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
    _prefetch([*passing, *staying[:-1]])


def _prefetch(modules: list) -> None:
    """Each asks for the weights of the next before its own forward is queued, so that the two overlap also where the
    host is the slower one. In backward FSDP2 itself does so, one module ahead."""
    for module, following in pairwise(modules):
        module.set_modules_to_forward_prefetch([following])


def _reshards(ranks: Ranks, parallel: ParallelConfig) -> bool:
    """Whether gathered weights go after each block; on a CPU they would leave nothing that is short."""
    return parallel.reshard == "block" or (parallel.reshard == "auto" and ranks.device.type == "cuda")
