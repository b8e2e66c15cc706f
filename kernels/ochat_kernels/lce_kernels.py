"""The kernels of the linear head's loss: statistics of a chunk of logits, and its gradient written over them.

One program per row, which reads the row once for its statistics and once more for its gradient. In the first pass each
lane keeps an online maximum and sum of its own, so that nothing waits for the other lanes before the row's end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import launch
from ochat_kernels.reference_loss import IGNORE_INDEX
from ochat_kernels.rounding import narrow

NUM_WARPS = 8
THREAD_BYTES = 32  # of logits: two 16-byte loads a thread; with four, in fp32, Triton 3.6 spills
SCALE_BLOCK = 2048

_IGNORE = tl.constexpr(IGNORE_INDEX)
_LOWEST = tl.constexpr(-1.0e38)  # finite: the difference of two such is 0, not NaN


@triton.jit
def _capped(z, cap, HAS_CAP: tl.constexpr):
    """cap * tanh(z / cap), with full relative precision near 0, where 1 - exp cancels."""
    if HAS_CAP:
        u = z / cap
        decay = tl.exp(-2.0 * tl.abs(u))
        far = (1.0 - decay) / (1.0 + decay)
        square = u * u
        near = tl.abs(u) * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
        tanh = tl.where(square < 0.01, near, far)
        z = cap * tl.where(u < 0, -tanh, tanh)
    return z


@triton.jit
def _write_gradient(
    z_ptr,
    label,
    w,
    is_live,
    lse,
    stride_zn,
    V,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Replaces the row's logits by (softmax - target) * w, and its unused columns, up to the stride, by 0."""
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        mask = v < stride_zn
        z = tl.load(z_ptr + v, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = _capped(z, cap, HAS_CAP)
        d = tl.exp(z - lse)
        d -= tl.where(v == label, 1.0, 0.0)
        if HAS_CAP:
            d *= 1.0 - (z / cap) * (z / cap)
        d = tl.where((v < V) & is_live, d * w, 0.0)
        tl.store(z_ptr + v, narrow(d, z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lce_stats_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    nll_ptr,
    correct_ptr,
    lse_ptr,
    stride_zn,
    V,
    cap,
    HAS_CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + n * stride_zn
    label = tl.load(labels_ptr + n)
    w = tl.load(weights_ptr + n)
    is_live = (label != _IGNORE) & (w != 0.0)
    is_known = (label >= 0) & (label < V)
    label_logit = tl.load(z_ptr + label, mask=is_known, other=float("nan")).to(tl.float32)  # an unknown label is loud
    label_logit = _capped(label_logit, cap, HAS_CAP)

    largest = tl.full([BLOCK_V], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    ahead = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        # the mask ends at the stride, which 16 divides, so that loads stay wide for every V
        z = tl.load(z_ptr + v, mask=v < stride_zn, other=0.0).to(tl.float32)
        z = _capped(z, cap, HAS_CAP)
        z = tl.where(v < V, z, float("-inf"))
        step = tl.exp(-tl.abs(z - largest))  # of the two scales one is always 1
        total = tl.where(z > largest, total * step + 1.0, total + step)
        largest = tl.where(z > largest, z, largest)
        is_behind = (z < label_logit) | ((z == label_logit) & (v >= label))
        ahead = tl.where(is_behind, ahead, 1)

    row_largest = tl.max(largest, 0)
    lse = row_largest + tl.log(tl.sum(total * tl.exp(largest - row_largest), 0))
    tl.store(nll_ptr + n, tl.where(is_live, lse - label_logit, 0.0))
    tl.store(correct_ptr + n, (is_live & (tl.max(ahead, 0) == 0)).to(tl.int8))
    tl.store(lse_ptr + n, lse)
    if GRADIENT:
        _write_gradient(z_ptr, label, w, is_live, lse, stride_zn, V, cap, HAS_CAP, BLOCK_V)


@triton.jit
def lce_grad_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    lse_ptr,
    stride_zn,
    V,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + n)
    w = tl.load(weights_ptr + n)
    is_live = (label != _IGNORE) & (w != 0.0)
    lse = tl.load(lse_ptr + n)
    z_ptr = logits_ptr + n * stride_zn
    _write_gradient(z_ptr, label, w, is_live, lse, stride_zn, V, cap, HAS_CAP, BLOCK_V)


@triton.jit
def lce_scale_kernel(x_ptr, factor_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_elements
    x = tl.load(x_ptr + i, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    factor = tl.load(factor_ptr).to(tl.float32)
    tl.store(y_ptr + i, narrow(x * factor, y_ptr.dtype.element_ty), mask=mask)


class RowStatistics:
    """What is known of each live row, (R,) each, filled chunk by chunk."""

    def __init__(self, num_rows: int, device: torch.device):
        self.nll, self.lse = (torch.empty(num_rows, device=device) for _ in range(2))  # fp32
        self.correct = torch.empty(num_rows, dtype=torch.int8, device=device)

    def slice(self, start: int, end: int) -> dict[str, Tensor]:
        fields = {"nll": self.nll, "correct": self.correct, "lse": self.lse}
        return {f"{name}_ptr": values[start:end] for name, values in fields.items()}


def lce_stats(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    stats: dict[str, Tensor],
    softcap: float,
    gradient: bool,
) -> None:
    """Launches the statistics of logits (n, V) into a slice of RowStatistics; with `gradient` the logits become it.

    The stride of the logits' rows may pass V; the columns between belong to the kernel.
    """
    arguments = (
        {"logits_ptr": logits, "labels_ptr": labels, "weights_ptr": weights} | stats | _settings(logits, softcap)
    )
    arguments |= {"GRADIENT": gradient}
    launch(lce_stats_kernel, (logits.shape[0],), arguments, num_warps=NUM_WARPS)


def lce_grad(logits: Tensor, labels: Tensor, weights: Tensor, lse: Tensor, softcap: float) -> None:
    """Launches the gradient alone, over the logits, for weights that were only known after the statistics."""
    arguments = {"logits_ptr": logits, "labels_ptr": labels, "weights_ptr": weights, "lse_ptr": lse}
    arguments |= _settings(logits, softcap)
    launch(lce_grad_kernel, (logits.shape[0],), arguments, num_warps=NUM_WARPS)


def lce_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Launches `x * factor`, rounded once to `dtype`; x contiguous, factor ()."""
    y = torch.empty_like(x, dtype=dtype)
    arguments = {"x_ptr": x, "factor_ptr": factor, "y_ptr": y, "num_elements": x.numel(), "BLOCK": SCALE_BLOCK}
    launch(lce_scale_kernel, (triton.cdiv(x.numel(), SCALE_BLOCK),), arguments)
    return y


def block_size(dtype: torch.dtype) -> int:
    """Logits that a program takes at a time."""
    return 32 * NUM_WARPS * THREAD_BYTES // dtype.itemsize


def _settings(logits: Tensor, cap: float) -> dict[str, object]:
    return {
        "stride_zn": logits.stride(0),
        "V": logits.shape[1],
        "cap": float(cap),
        "HAS_CAP": cap > 0,
        "BLOCK_V": block_size(logits.dtype),
    }
