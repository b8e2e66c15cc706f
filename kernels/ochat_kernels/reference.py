"""Every operator in plain PyTorch: the definition, and what a CPU trains with.

Statistics are taken in fp32 (float64 for float64 inputs) and rounded once, to the input's dtype, at the end.
Letters: T packed tokens, H hidden, F FFN, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat_kernels.reference_adamw import adamw
from ochat_kernels.reference_loss import IGNORE_INDEX, LossOutput, linear_cross_entropy, statistics_dtype

__all__ = ["IGNORE_INDEX", "LossOutput", "adamw", "add_rms_norm", "linear_cross_entropy", "rms_norm", "rope", "swiglu"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; x (..., H), weight (H,), in x's dtype."""
    wide = x.to(statistics_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; x and residual (T, H), weight (H,)."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps), new_residual


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (i, i + D/2) of each head by its token's angle: q (T, N, D), k (T, K, D), cos and sin (T,
    D/2) fp32."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` with the gate in the first half of the last dimension; (T, 2F) -> (T, F)."""
    gate, up = gate_up.to(statistics_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = statistics_dtype(x)
    first, second = x.to(wide).chunk(2, dim=-1)  # (T, heads, D/2)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
