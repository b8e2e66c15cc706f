"""Two runs bitwise equal: what `run.deterministic` asks of torch, cuBLAS, NCCL and the compiler before they start.

    determinism.apply(config)
A CPU, gloo and our Triton kernels (no atomics, no autotuning) need none of it. Equal: the losses and weights of runs on
the same machine, number of processes and versions.
"""

from __future__ import annotations

import os

import torch

from ochat.config import Config
from ochat.errors import ConfigError

# What is set where nothing is, then what else is as good.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # else streams that share a workspace choose its products
    "NCCL_NVLS_ENABLE": ("0",),  # sums inside NVLink's switches come in the order in which they arrive
}


def apply(config: Config) -> None:
    """Sets up this process; the switch is torch's, so that it also undoes an earlier run's in the same process.

    Raises: ConfigError for a variable of the environment that says otherwise. Costs, on CUDA: attention's backward adds
    up in order (FlashAttention: tens of percent of it), sums by index sort first, no sums inside NVLink's switches; a
    compiler that picks kernels without timing them. Memory stays as it is.
    """
    wanted = config.run.deterministic
    torch.use_deterministic_algorithms(wanted)
    # nothing reads uninitialised memory, and filling it would cost a pass over all of it
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]
    if not wanted:
        return
    for name, values in ENVIRONMENT.items():
        if os.environ.setdefault(name, values[0]) not in values:
            raise ConfigError(
                f"run.deterministic = true, but the environment says {name}={os.environ[name]}; unset it, or set "
                f"{' or '.join(values)}"
            )
    if config.train.compile:
        _tame_compiler()


def _tame_compiler() -> None:
    from torch._inductor import config as inductor  # here: slow to import

    if not hasattr(inductor, "deterministic"):
        raise ConfigError(
            f"run.deterministic = true beside train.compile = true: torch {torch.__version__} picks kernels by timing "
            "them; leave one of the two out"
        )
    inductor.deterministic = True
