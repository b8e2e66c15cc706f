"""The operators of a CPU: the definitions compiled, each into one pass over memory that keeps little for backward.

    ops = ochat_kernels.load("compiled")  # needs a C++ compiler; a machine's first calls take a minute
torch's compiler (inductor) makes fp32 arithmetic of the definitions and rounds where they do. What does not gain, the
optimizer and fp8, is the definition itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ochat_kernels import reference, reference_loss
from ochat_kernels.dynamic_weights import Dynamic
from ochat_kernels.reference import *  # noqa: F403
from ochat_kernels.reference import LossOutput


def has_compiler() -> bool:
    """Whether there is a C++ compiler, without which torch cannot compile for a CPU."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


rms_norm = _compiled(reference.rms_norm)
add_rms_norm = _compiled(reference.add_rms_norm)
rope = _compiled(reference.rope)
qkv_rope = _compiled(reference.qkv_rope)
qkv_norm_rope = _compiled(reference.qkv_norm_rope)
swiglu = _compiled(reference.swiglu)
geglu = _compiled(reference.geglu)
_PASSES = _compiled(reference_loss.statistics), _compiled(reference_loss.gradient)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    *,
    rows: Tensor | None = None,
    chunk_rows: int | None = None,
    softcap: float = 0.0,
    weight_transform: reference_loss.WeightTransform | None = None,
    dynamic: Dynamic | None = None,
    grad_weight: Tensor | None = None,
    accumulate: bool = False,
) -> LossOutput:
    """The definition (reference_loss.py), with one pass over a chunk's logits for statistics and one for gradients."""
    options = rows, chunk_rows, softcap, weight_transform, dynamic, grad_weight, accumulate
    return reference_loss.by_chunks(_PASSES, hidden, weight, labels, loss_weights, *options)
