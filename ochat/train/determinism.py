"""Make two runs bitwise equal: settings of torch, cuBLAS, NCCL and the compiler for `run.deterministic`.

    determinism.apply(True)
Losses and weights are then equal on the same machine, number of processes and versions. CPUs, gloo and our Triton
kernels (no atomics, no autotuning) are deterministic without it.
"""

from __future__ import annotations

import os

import torch

from ochat.errors import ConfigError

# variable -> values that make it deterministic; the first is set if the variable is not
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # otherwise cuBLAS may choose other kernels per stream
    "NCCL_NVLS_ENABLE": ("0",),  # NVLink switches sum in order of arrival
}


def apply(wanted: bool, *, compiles: bool = False) -> None:
    """Set up this process; `wanted` = False undoes it. `compiles`: train.compile.

    Raises: ConfigError for an environment variable with another value. Costs on CUDA: the backward of attention sums in
    a fixed order (tens of percent of FlashAttention's), index sums sort first, NVLink switches do not sum, and the
    compiler picks kernels without timing them. Memory use does not change.
    """
    torch.use_deterministic_algorithms(wanted)
    # no code reads uninitialised memory; filling it would cost a pass over all of it
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]
    if not wanted:
        return
    for name, values in ENVIRONMENT.items():
        if os.environ.setdefault(name, values[0]) not in values:
            raise ConfigError(
                f"run.deterministic = true, but the environment says {name}={os.environ[name]}; unset it, or set "
                f"{' or '.join(values)}"
            )
    if compiles:
        _make_compiler_deterministic()


def _make_compiler_deterministic() -> None:
    from torch._inductor import config as inductor  # here: slow to import

    if not hasattr(inductor, "deterministic"):
        raise ConfigError(
            f"run.deterministic = true with train.compile = true: torch {torch.__version__} picks kernels by timing "
            "them; leave one of the two out"
        )
    inductor.deterministic = True
