"""Processes, devices, and the order in which a model is wrapped: recompute, compile, shard.

Started by torchrun, every process is a rank; alone, there is one rank and no wrapper. `shard` ranks hold one copy of
the model between them (FSDP2), `replicate` such groups work side by side. Gradients are summed over all ranks, never
averaged: the loss is already divided by the weight of the whole step.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch._functorch.config as compiler
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # the groups of a mesh do not inherit it
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ochat.config import ParallelConfig, TrainConfig
from ochat.errors import ConfigError, OchatError
from ochat.model.transformer import Transformer
from ochat.train.meeting import meet

DISK_TIMEOUT = timedelta(hours=2)  # the slowest rank's write of its part of a checkpoint; of the dead we hear sooner
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either before it first allocates
MARGIN_S = 60.0  # by which torch's own time-outs come after the watchdog's, which says more


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # (replicate, shard); None: one process, no wrapper
    store: Any = None  # a torch.distributed Store (whose stubs lack clone) of this start's processes
    disk_group: Any = None  # a process group of all ranks over the host's network, with time for writes to a disk

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_tensor(self, values: Tensor) -> Tensor:
        """The tensor summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    @property
    def shard(self) -> tuple[int, int, bool]:
        """(which shard of the model this rank holds, of how many, whether it is in the first of the replicas)."""
        if self.mesh is None:
            return 0, 1, True
        return self.mesh.get_local_rank("shard"), self.mesh["shard"].size(), self.mesh.get_local_rank("replicate") == 0

    @property
    def layout(self) -> str:
        """How the model lies on the ranks, in words."""
        if self.mesh is None:
            return "the whole model on one"
        replicas, shards = self.mesh["replicate"].size(), self.mesh["shard"].size()
        copies = f"{replicas} copies, each" if replicas > 1 else "one copy,"
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        hint = " (parallel.replicate = nodes would gather weights within a node)" if nodes > 1 == replicas else ""
        return f"{copies} sharded over {shards} processes, on {nodes} node{'s' * (nodes > 1)}{hint}"

    def exchange(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's JSON object, in the order of the ranks. Safe beside the main thread's collectives, in one thread
        at a time; torch's own exchange of objects would send pickles."""
        if self.world == 1:
            return [record]
        content = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        sizes = list(torch.empty(self.world, 1, dtype=torch.int64))
        dist.all_gather(sizes, torch.tensor([len(content)]), group=self.disk_group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(content)] = content
        received = list(torch.empty(self.world, len(padded), dtype=torch.uint8))
        dist.all_gather(received, padded, group=self.disk_group)
        return [json.loads(r[: int(n)].numpy().tobytes()) for r, n in zip(received, sizes, strict=True)]

    def raise_together(self, problem: str, kind: type[OchatError]) -> None:
        """Raises `kind` on every rank where one has a problem (empty: none): the first one's. Every rank calls it."""
        for answer in self.exchange({"problem": problem}):
            if answer["problem"]:
                raise kind(answer["problem"])


def start(train: TrainConfig, parallel: ParallelConfig) -> Ranks:
    """Joins the process group that torchrun describes and picks the device.

    Raises: ConfigError if the counts do not fit; RanksError if not all processes start.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(train.device)
    shard = parallel.shard or world // parallel.replicate
    if shard * parallel.replicate != world:
        raise ConfigError(
            f"parallel.shard = {parallel.shard} x parallel.replicate = {parallel.replicate} do not make the {world} "
            "processes that were started"
        )
    if world == 1:
        return Ranks(rank, world, device, None)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # would be a pickle; the watchdog writes JSON
    store, timeout = meet(), timedelta(seconds=parallel.timeout_s + MARGIN_S)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    mesh = init_device_mesh(device.type, (parallel.replicate, shard), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)
    return Ranks(rank, world, device, mesh, store, dist.new_group(backend="gloo", timeout=DISK_TIMEOUT))


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def rows(tensor: Tensor) -> tuple[int, int]:
    """The first row and the end of what this rank holds of a tensor that `wrap` may have sharded along its rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh  # the last dimension shards, as torch.chunk does; one before it replicates
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(tensor.shape[0], chunk * mesh.get_local_rank(mesh.ndim - 1))
    return start, start + tensor.to_local().shape[0]


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


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch sees no CUDA device; use --train.device=cpu")
    if not any(name in os.environ for name in ALLOCATOR):
        # segments that grow lose less between their blocks: a step of 1B at 4 x 16,384 has 43 GiB instead of 47
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
