"""The operators of a Llama training step, as Triton kernels and as their definitions in plain PyTorch.

    ops = ochat_kernels.load("triton")      # or "reference": the same functions, on any device
    out = ops.linear_cross_entropy(hidden, head_weight, labels, loss_weights)
They need torch and triton alone and know no trainer.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from ochat_kernels.dynamic_weights import Dynamic
from ochat_kernels.reference import LossOutput

IMPLEMENTATIONS = {
    "triton": "ochat_kernels.triton_ops",
    "reference": "ochat_kernels.reference",
    "compiled": "ochat_kernels.compiled",
}

__all__ = ["IMPLEMENTATIONS", "Dynamic", "LossOutput", "load"]


def load(name: str) -> ModuleType:
    """The module that implements every operator under `name`; ValueError for a name that is not in IMPLEMENTATIONS."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"no kernels named {name!r}; this version has: {', '.join(IMPLEMENTATIONS)}")
    return importlib.import_module(IMPLEMENTATIONS[name])
