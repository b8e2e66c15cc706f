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
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ochat.config import ParallelConfig, TrainConfig
from ochat.errors import ConfigError
from ochat.model.transformer import Transformer

DISK_TIMEOUT = timedelta(hours=2)  # the slowest rank's write of its part of a checkpoint


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # (replicate, shard); None: one process, no wrapper
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


def start(train: TrainConfig, parallel: ParallelConfig) -> Ranks:
    """Joins the process group that torchrun describes and picks the device; ConfigError if the counts do not fit."""
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (parallel.replicate, shard), mesh_dim_names=("replicate", "shard"))
    return Ranks(rank, world, device, mesh, dist.new_group(backend="gloo", timeout=DISK_TIMEOUT))


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: Transformer, ranks: Ranks, train: TrainConfig, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    """Applies what the configuration asks for, in this order: recompute, compile each block, shard each block and the
    rest.

    `model` may be on the meta device. A sharded model computes in `dtype` and reduces gradients in fp32. Tied
    embeddings stay in one group, the root's; untied ones get a group each.
    """
    model.recompute = train.recompute
    if train.compile:
        for block in model.blocks:
            block.compile()
    if ranks.mesh is not None:
        _shard(model, ranks, parallel, dtype)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over ranks: only the last micro-batch of a step needs to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def rows(tensor: Tensor) -> tuple[int, int]:
    """The first row and the end of what this rank holds of a tensor that `wrap` may have sharded along its rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh  # the last dimension shards, as torch.chunk does; one before it replicates
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(tensor.shape[0], chunk * mesh.get_local_rank(mesh.ndim - 1))
    return start, start + tensor.to_local().shape[0]


def _shard(model: Transformer, ranks: Ranks, parallel: ParallelConfig, dtype: torch.dtype) -> None:
    mesh = ranks.mesh
    assert mesh is not None
    options: dict = {
        "mesh": mesh["shard"] if mesh["replicate"].size() == 1 else mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": ranks.device.type == "cuda",
    }
    if parallel.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for block in model.blocks:
        fully_shard(block, **options)
    if model.head.weight is not model.embed.weight:
        fully_shard(model.embed, **options)
        fully_shard(model.head, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _device(name: str) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch sees no CUDA device; use --train.device=cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
