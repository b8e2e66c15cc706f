"""Every operator in plain PyTorch: the definition, and what a CPU trains with.

Statistics are taken in fp32 (float64 for float64 inputs) and rounded once, to the input's dtype, at the end.
Letters: T packed tokens, H hidden, F FFN, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat_kernels.reference_adamw import adamw, adamw_with_norm
from ochat_kernels.reference_fp8 import quantize_rows, quantize_transposed, scaled_product
from ochat_kernels.reference_loss import IGNORE_INDEX, LossOutput, linear_cross_entropy, statistics_dtype

__all__ = [
    "IGNORE_INDEX",
    "LossOutput",
    "adamw",
    "adamw_with_norm",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "geglu",
    "geglu_fp8",
    "linear_cross_entropy",
    "qkv_norm_rope",
    "qkv_rope",
    "quantize_rows",
    "quantize_transposed",
    "rms_norm",
    "rms_norm_fp8",
    "rope",
    "scaled_product",
    "swiglu",
    "swiglu_fp8",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension; x (..., H), weight (H,), in x's dtype.
    Gemma stores its weights less 1: offset 1."""
    return _normalize(x.to(statistics_dtype(x)), weight, eps, offset).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`; x and residual (T, H), weight (H,)."""
    new_residual = x + residual
    return rms_norm(new_residual, weight, eps, offset), new_residual


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, *quantize_rows(y))` for y = rms_norm(x), x (T, H); y alone has a gradient."""
    y = rms_norm(x, weight, eps, offset)
    return y, *quantize_rows(y.detach())


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, *quantize_rows(y), new_residual)` for (y, new_residual) = add_rms_norm(x, residual)."""
    y, new_residual = add_rms_norm(x, residual, weight, eps, offset)
    return y, *quantize_rows(y.detach()), new_residual


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (i, i + d/2) of the first d elements of each head by its token's angle; the others stay. q (T,
    N, D), k (T, K, D), cos and sin (T, d/2) fp32."""
    wide = statistics_dtype(q)
    turned_q, turned_k = (_rotate(x.to(wide), cos, sin).to(x.dtype) for x in (q, k))
    return turned_q, turned_k


def qkv_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """rope of q and k (T, K, D), and v (T, K, D), of one product (T, (N + 2K) D), in new memory."""
    q, k, v = _heads(qkv, num_heads, num_kv_heads)
    return *rope(q, k, cos, sin), v.clone(memory_format=torch.contiguous_format)


def qkv_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv_rope after rms_norm of each head of q by q_weight and of k by k_weight, both (D,); rounded once, at the
    end."""
    wide = statistics_dtype(qkv)
    q, k, v = _heads(qkv, num_heads, num_kv_heads)
    turned_q, turned_k = (
        _rotate(_normalize(x.to(wide), weight, eps, offset), cos, sin).to(x.dtype)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return turned_q, turned_k, v.clone(memory_format=torch.contiguous_format)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` with the gate in the first half of the last dimension; (T, 2F) -> (T, F)."""
    gate, up = gate_up.to(statistics_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up`, otherwise as swiglu; gelu(x) is `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`."""
    gate, up = gate_up.to(statistics_dtype(gate_up)).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def swiglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, *quantize_rows(y))` for y = swiglu(gate_up); y alone has a gradient."""
    y = swiglu(gate_up)
    return y, *quantize_rows(y.detach())


def geglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """geglu, quantised as in swiglu_fp8."""
    y = geglu(gate_up)
    return y, *quantize_rows(y.detach())


def _heads(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    """q (T, N, D), k and v (T, K, D) as views of a product (T, (N + 2K) D)."""
    each = (num_heads, num_kv_heads, num_kv_heads)
    return qkv.unflatten(1, (sum(each), qkv.shape[1] // sum(each))).split(each, dim=1)


def _normalize(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """rms_norm in the dtype of x (..., H)."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd * (offset + weight.to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope in the dtype of x (T, heads, D)."""
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)  # (T, heads, d/2) twice, then D - d
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
