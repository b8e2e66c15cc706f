"""Start and stop the processes of a run, and exchange small records between them.

Each process that torchrun starts is one rank. A single process is rank 0 of 1 and has no process group. torchrun's
store outlives restarts and still holds addresses and NCCL ids of processes of earlier launches. So rank 0 gives a fresh
launch id to each process that is alive now, and all keys of this launch carry that prefix.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from ochat.config import ParallelConfig, TrainConfig
from ochat.errors import ConfigError, OchatError, RanksError

DISK_TIMEOUT = timedelta(hours=2)  # for the slowest rank's part of a checkpoint; the watchdog finds dead ranks sooner
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either before its first allocation
POLL_S, START_S = 0.05, 600.0  # machines of one job may start far apart
MARGIN_S = 60.0  # torch's own time-outs come so much later than the watchdog's, whose message says more


@dataclass(frozen=True)
class Ranks:
    """This process's place among all processes of the run."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # (replicate, shard); None: a single process, not sharded
    store: Any = None  # the torch.distributed Store of this launch (its type stubs lack clone)
    disk_group: Any = None  # a gloo group of all ranks whose time-out leaves room for disk writes

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
        """(index of this rank's shard of the model, number of shards, whether this is the first replica)."""
        if self.mesh is None:
            return 0, 1, True
        return self.mesh.get_local_rank("shard"), self.mesh["shard"].size(), self.mesh.get_local_rank("replicate") == 0

    @property
    def layout(self) -> str:
        """How the model is distributed over the ranks, in words."""
        if self.mesh is None:
            return "the whole model on one"
        replicas, shards = self.mesh["replicate"].size(), self.mesh["shard"].size()
        copies = f"{replicas} copies, each" if replicas > 1 else "one copy,"
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        hint = " (parallel.replicate = nodes would gather weights within a node)" if nodes > 1 == replicas else ""
        return f"{copies} sharded over {shards} processes, on {nodes} node{'s' * (nodes > 1)}{hint}"

    def all_gather_json(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's JSON object, in rank order. Another thread may call it during the main thread's collectives, one
        thread at a time. torch's own all_gather_object would send pickles."""
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

    def all_reach(self, place: str, seconds: float) -> bool:
        """Whether every rank calls it for this place, once a launch, within `seconds`: for what only all of them can
        do, where some may wait elsewhere."""
        if self.world == 1:
            return True
        self.store.set(f"{place}/{self.rank}", "")
        try:
            self.store.wait([f"{place}/{rank}" for rank in range(self.world)], timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return True

    def raise_on_all_ranks(self, problem: str, kind: type[OchatError]) -> None:
        """Raises `kind` with the first rank's problem on all ranks, if any has one (not ""). All ranks call it."""
        for answer in self.all_gather_json({"problem": problem}):
            if answer["problem"]:
                raise kind(answer["problem"])


def alone() -> Ranks:
    """The one process of a run on a CPU."""
    return Ranks(0, 1, torch.device("cpu"), None)


def start(train: TrainConfig, parallel: ParallelConfig) -> Ranks:
    """Join the process group that torchrun describes and select the device.

    Raises: ConfigError if the counts do not fit; RanksError if not all processes start.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, shard = select_device(train.device), check_counts(parallel, world)
    if world == 1:
        return Ranks(rank, world, device, None)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")  # it would be a pickle; the watchdog writes JSON
    store, timeout = _launch_store(), timedelta(seconds=parallel.timeout_s + MARGIN_S)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    mesh = init_device_mesh(device.type, (parallel.replicate, shard), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # which do not inherit it
        _set_pg_timeout(timeout, group)
    return Ranks(rank, world, device, mesh, store, dist.new_group(backend="gloo", timeout=DISK_TIMEOUT))


def check_counts(parallel: ParallelConfig, world: int) -> int:
    """The processes, of `world`, that share one copy of the model. Raises: ConfigError if the counts do not fit."""
    shard = parallel.shard or world // parallel.replicate
    if shard * parallel.replicate != world:
        raise ConfigError(
            f"parallel.shard = {parallel.shard} x parallel.replicate = {parallel.replicate} do not make the {world} "
            "processes that were started"
        )
    if world == 1 and parallel.offload == "all":
        raise ConfigError(
            "parallel.offload = 'all' needs more than one process; on one, 'optimizer' keeps the moments in host memory"
        )
    return shard


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def select_device(name: str) -> torch.device:
    """The device of train.device on this rank. Raises: ConfigError for "cuda" without a GPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch sees no CUDA device; use --train.device=cpu")
    if not any(name in os.environ for name in ALLOCATOR):
        # expandable segments fragment less: a step of 1B at 4 x 16,384 tokens takes 43 GiB instead of 47
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _launch_store() -> Store:
    """A store that only the processes of this launch share.

    Raises: RanksError naming the ranks that have not arrived after START_S.
    """
    store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=START_S)))
    ours = PrefixStore("ochat", store)
    return PrefixStore(_hand_out_id(ours, world) if rank == 0 else _request_id(ours, rank), ours)


def _hand_out_id(store: Store, world: int) -> str:
    """Rank 0: answers every request with the launch id until each rank has confirmed it."""
    launch_id, missing = uuid.uuid4().hex, set(range(1, world))
    deadline = time.monotonic() + START_S
    while missing:
        if time.monotonic() > deadline:
            raise RanksError(_absent(sorted(missing)))
        for rank in sorted(missing):
            if store.check([f"confirmed/{launch_id}/{rank}"]):
                missing.discard(rank)
            elif store.check([request := f"request/{rank}"]):
                # may be that of a process which is gone: nothing reads the reply
                store.set(f"reply/{store.get(request).decode()}", launch_id)
        time.sleep(POLL_S)
    return launch_id


def _request_id(store: Store, rank: int) -> str:
    """Other ranks: requests with a nonce, and accepts the reply to that nonce only."""
    nonce = uuid.uuid4().hex
    store.set(f"request/{rank}", nonce)
    try:
        launch_id = store.get(f"reply/{nonce}").decode()
    except RuntimeError:  # the store's time-out
        raise RanksError(_absent([0])) from None
    store.set(f"confirmed/{launch_id}/{rank}", "")
    return launch_id


def _absent(ranks: list[int]) -> str:
    return (
        f"waited {START_S:.0f} s for rank {', '.join(map(str, ranks[:16]))}"
        f"{' ...' * (len(ranks) > 16)} to start; look for an error in the output of those processes or their machines"
    )
