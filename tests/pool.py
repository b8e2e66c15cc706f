"""Run functions on several ranks without starting processes each time: workers that live as long as pytest.

    done = pool.run(2, "tests.pool:train", "config.toml", "--run.dir=runs/a");  done.returncode, done.stdout

Each worker gets the environment that torchrun would set, with a fresh port for every call; the function joins and
leaves the process group itself. A worker that exits is replaced. Tests of kills and launchers use torchrun.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

_workers: dict[int, ProcessPoolExecutor] = {}  # of one process each, by rank


def run(processes: int, function: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Calls `function` ("module:name") with the arguments on ranks 0 to `processes` - 1.

    Returns the largest exit code (that of an OchatError or SystemExit; 1 for any other error, whose traceback is
    printed, and for a worker that exits) and what the ranks printed, in their order. Raises: AssertionError if `check`
    and the code is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("", 0))
            common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            common |= {"MASTER_PORT": free.getsockname()[1], "GROUP_WORLD_SIZE": 1}
        files = [[f"{folder}/{name}{rank}" for name in ("out", "err")] for rank in range(processes)]
        jobs = []
        for rank in range(processes):
            if rank not in _workers:
                _workers[rank] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
            environment = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            jobs.append(_workers[rank].submit(_work, environment, files[rank], function, arguments))
        codes = [_exit_code(rank, job) for rank, job in enumerate(jobs)]
        printed = ["".join(Path(file).read_text() for file in each) for each in zip(*files, strict=True)]
    done = subprocess.CompletedProcess([function, *arguments], max(codes), *printed)
    if check and done.returncode:
        raise AssertionError(f"{function} ended with {codes}:\n{done.stdout}\n{done.stderr}")
    return done


@contextlib.contextmanager
def in_name_only(rank: int, world: int) -> Iterator[Any]:
    """The Ranks of this process as one of several of which no other exists: collectives do nothing."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ochat.distributed.processes import Ranks

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    try:
        yield Ranks(rank, world, torch.device("cpu"), mesh)
    finally:
        torch.distributed.destroy_process_group()


def train(*arguments: str) -> None:
    """`ochat train` with these arguments, errors raised."""
    from ochat import config as configuration
    from ochat.console import configure_logging
    from ochat.train import trainer

    configure_logging()
    trainer.train(configuration.load(arguments[0], arguments[1:]))


def _exit_code(rank: int, job: Future[int]) -> int:
    try:
        return job.result()
    except BrokenProcessPool:
        del _workers[rank]
        return 1


def _begin() -> None:
    """A worker's start."""
    os.environ.update(ENVIRONMENT)
    import torch

    torch.set_num_threads(1)


def _work(environment: dict[str, str], files: Sequence[str], function: str, arguments: Sequence[str]) -> int:
    """One call in a worker, whose output goes to the files; the exit code."""
    from torch.distributed.tensor import debug

    os.environ.update(environment)
    for descriptor, file in zip((1, 2), files, strict=True):
        with open(file, "w") as output:
            os.dup2(output.fileno(), descriptor)
    try:
        return _call(function, arguments)
    finally:
        debug._clear_sharding_prop_cache()  # it would give tensors the equal mesh of a process group that is gone
        sys.stdout.flush()
        sys.stderr.flush()


def _call(function: str, arguments: Sequence[str]) -> int:
    from ochat.console import complain
    from ochat.errors import OchatError

    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except (OchatError, OSError) as error:
        complain(error)
        return getattr(error, "exit_code", 1)
    except SystemExit as error:
        return int(error.code or 0)
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return 1
    return 0
