"""The kernels of the linear head's loss: statistics of a chunk of logits, and its gradient written over them.

A program per row reads it once for its statistics and once more, from the L2, for its gradient. What one load of a
thread brings, a lane, keeps a maximum and a sum of its own, so that nothing waits before the row's end.
Compiled for sm_90 in bf16, both passes together take 16 instructions a logit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.dynamic_weights import Dynamic
from ochat_kernels.launch import INTERPRETED, launch, num_processors
from ochat_kernels.reference_loss import IGNORE_INDEX
from ochat_kernels.rounding import narrow

AT_WORK_BYTES = 40e6  # of the rows that are worked on at once, within an L2 of 50 MB: 132 of V 128256 in bf16 are 34 MB
THREAD_BYTES = 32  # of logits that a thread takes at a time: two lanes
LANE_BYTES = 16
SCALE_BLOCK = 2048

_IGNORE = tl.constexpr(IGNORE_INDEX)
_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite: the difference of two such is 0, not NaN


@triton.jit
def _exp(x) -> tl.tensor:
    """e^x, and 0 below 2^-126: the results between would cost a card three instructions more than the two of this."""
    if _INTERPRETED:
        return tl.exp(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * _LOG2_E], tl.float32, True, 1)  # type: ignore


@triton.jit
def _tanh(u):
    """With full relative precision near 0, where 1 - exp cancels."""
    size, square = tl.abs(u), u * u
    decay = _exp(-2.0 * size)
    far = (1.0 - decay) / (1.0 + decay)
    near = size * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    tanh = tl.where(square < 0.01, near, far)
    return tl.where(u < 0, -tanh, tanh)


@triton.jit
def _capped(z, cap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        z = cap * _tanh(z * (1.0 / cap))
    return z


@triton.jit
def _add_tile(z, first, label, largest, total, moment, before, LANE: tl.constexpr, ENTROPY: tl.constexpr):
    """The statistics of all lanes with a tile of logits z (lanes, LANE), whose columns begin at `first` (lanes,).

    `before` is the largest logit of the lanes that end before the label; `moment` the sum of e^d d, where `total` is
    that of e^d, d = z - largest."""
    new = tl.maximum(largest, tl.max(z, 1))
    d = z - new[:, None]
    scale, powers = _exp(largest - new), _exp(d)
    if ENTROPY:
        moment = (moment + total * (largest - new)) * scale + tl.sum(powers * tl.maximum(d, _LOWEST), 1)  # no 0 * -inf
    return new, total * scale + tl.sum(powers, 1), moment, tl.where(first + LANE <= label, new, before)


@triton.jit
def _gradient(z, target, w, lse, cap, HAS_CAP: tl.constexpr):
    """Of w times the row's loss to logits z, as they were before the cap; target 1 at the label, else 0."""
    if HAS_CAP:
        tanh = _tanh(z * (1.0 / cap))
        return (_exp(cap * tanh - lse) - target) * w * (1.0 - tanh * tanh)
    return (_exp(z - lse) - target) * w


@triton.jit
def _write_gradient(z_ptr, label, w, lse, label_lse, stride_zn, V, cap, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """Replaces the row's logits by (e^(z - lse) - target) * w, and its unused columns, up to the stride, by 0.

    `label_lse` stands for lse at the label: infinite where lse sums the others alone. It goes from the row's end, which
    the statistics read last, to its start: what the L1 still holds is read from there."""
    dtype = z_ptr.dtype.element_ty
    is_known = (label >= 0) & (label < V)
    label_logit = tl.load(z_ptr + label, mask=is_known, other=0.0).to(tl.float32)
    tl.debug_barrier()  # all threads have read it, so one may write over it
    v = tl.arange(0, BLOCK_V)
    whole = V // BLOCK_V * BLOCK_V
    if whole < V:
        mask = whole + v < stride_zn  # the stride, which 16 divides, so that accesses stay wide for every V
        z = tl.load(z_ptr + whole + v, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        d = tl.where(whole + v < V, _gradient(z, 0.0, w, lse, cap, HAS_CAP), 0.0)
        tl.store(z_ptr + whole + v, narrow(d, dtype), mask=mask)
    for done in range(0, whole, BLOCK_V):
        at = z_ptr + (whole - BLOCK_V - done) + v
        z = tl.load(at, eviction_policy="evict_first").to(tl.float32)
        tl.store(at, narrow(_gradient(z, 0.0, w, lse, cap, HAS_CAP), dtype))
    tl.debug_barrier()  # the label's tile is written, so its element may be again
    tl.store(z_ptr + label, narrow(_gradient(label_logit, 1.0, w, label_lse, cap, HAS_CAP), dtype), mask=is_known)


@triton.jit
def _clear(z_ptr, stride_zn, BLOCK_V: tl.constexpr):
    for start in range(0, stride_zn, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        tl.store(z_ptr + v, tl.zeros([BLOCK_V], z_ptr.dtype.element_ty), mask=v < stride_zn)


@triton.jit
def _summed(z, within, label, cap, HAS_CAP: tl.constexpr, OTHERS: tl.constexpr):
    """Logits of lanes as they are summed: capped; with OTHERS the label's, at `label` (lanes,) within its, is -inf."""
    z = _capped(z.to(tl.float32), cap, HAS_CAP)
    if OTHERS:
        z = tl.where(within[None, :] == label[:, None], float("-inf"), z)
    return z


@triton.jit
def _statistics(
    z_ptr, label, stride_zn, V, cap,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """(nll, whether the label's logit is the first of the largest, logsumexp, what KIND needs) of a row; NaN for an
    unknown label. "eaft" needs the entropy, "unlikelihood" the label's logit less the logsumexp of the others, which
    are summed without it."""
    is_known = (label >= 0) & (label < V)
    label_logit = tl.load(z_ptr + label, mask=is_known, other=float("nan")).to(tl.float32)
    label_logit = _capped(label_logit, cap, HAS_CAP)
    column = tl.where(is_known, label, 0).to(tl.int32)

    ENTROPY: tl.constexpr = KIND == "eaft"
    OTHERS: tl.constexpr = KIND == "unlikelihood"
    LANES: tl.constexpr = BLOCK_V // LANE
    largest = tl.full([LANES], _LOWEST, tl.float32)
    total, moment = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    before = tl.full([LANES], float("-inf"), tl.float32)
    lane, within = tl.arange(0, LANES) * LANE, tl.arange(0, LANE)
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        v = start + lane[:, None] + within[None, :]
        z = _summed(tl.load(z_ptr + v), within, column - start - lane, cap, HAS_CAP, OTHERS)
        largest, total, moment, before = _add_tile(
            z, start + lane, column, largest, total, moment, before, LANE, ENTROPY
        )
    if whole < V:
        v = whole + lane[:, None] + within[None, :]
        z = tl.load(z_ptr + v, mask=v < stride_zn, other=0.0)
        z = _summed(z, within, column - whole - lane, cap, HAS_CAP, OTHERS)
        z = tl.where(v < V, z, float("-inf"))
        largest, total, moment, before = _add_tile(
            z, whole + lane, column, largest, total, moment, before, LANE, ENTROPY
        )

    row_largest = tl.max(largest, 0)
    scale = _exp(largest - row_largest)
    row_total = tl.sum(total * scale, 0)
    log_total = tl.log(row_total)
    v = column // LANE * LANE + within  # the label's own lane
    z = _capped(tl.load(z_ptr + v, mask=v < column, other=float("-inf")).to(tl.float32), cap, HAS_CAP)
    is_first = (tl.max(before, 0) < label_logit) & (tl.max(z, 0) < label_logit) & (row_largest <= label_logit)
    nll, lse, extra = row_largest - label_logit + log_total, row_largest + log_total, 0.0
    if ENTROPY:
        extra = log_total - tl.sum((moment + total * (largest - row_largest)) * (scale / row_total), 0)
    if OTHERS:
        extra = label_logit - lse
        nll = _softplus(-extra)
        lse = label_logit + nll
    return nll, is_first, lse, extra


@triton.jit
def _softplus(x):
    """ln(1 + e^x)."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + _exp(-tl.abs(x)))


@triton.jit
def _row_loss(w, nll, lse, extra, alpha, full_entropy, KIND: tl.constexpr):
    """(loss, weight, factor, lse, lse at the label) of a row: row_losses of dynamic_weights.py."""
    if KIND == "dft":
        w *= _exp(-nll)
    if KIND == "eaft":
        w *= _exp(alpha * tl.log(tl.minimum(extra / full_entropy, 1.0)))
    loss, factor, label_lse = w * nll, w, lse
    if KIND == "unlikelihood":
        is_negative, unlikelihood = w < 0.0, _softplus(extra)
        loss = tl.where(is_negative, -w * unlikelihood, loss)
        factor = tl.where(is_negative, w * _exp(-nll), w)
        label_lse = tl.where(is_negative, float("inf"), lse)
        lse = tl.where(is_negative, lse - unlikelihood, lse)
    return loss, w, factor, lse, label_lse


@triton.jit
def lce_stats_kernel(
    logits_ptr, labels_ptr, weights_ptr, nll_ptr, correct_ptr, lse_ptr, loss_ptr,
    stride_zn, V, cap, alpha, full_entropy,
    KIND: tl.constexpr, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + n * stride_zn
    label, w = tl.load(labels_ptr + n), tl.load(weights_ptr + n)
    if (label != _IGNORE) & (w != 0.0):
        nll, is_correct, lse, extra = _statistics(z_ptr, label, stride_zn, V, cap, KIND, HAS_CAP, BLOCK_V, LANE)
        tl.store(nll_ptr + n, nll)
        tl.store(correct_ptr + n, is_correct.to(tl.int8))
        tl.store(lse_ptr + n, lse)
        loss, weight, factor, lse, label_lse = _row_loss(w, nll, lse, extra, alpha, full_entropy, KIND)
        if KIND != "":
            tl.store(loss_ptr + n, loss)
            tl.store(weights_ptr + n, weight)
        if GRADIENT:
            _write_gradient(z_ptr, label, factor, lse, label_lse, stride_zn, V, cap, HAS_CAP, BLOCK_V)
    else:
        tl.store(nll_ptr + n, 0.0)
        tl.store(correct_ptr + n, 0)
        if KIND != "":
            tl.store(loss_ptr + n, 0.0)
            tl.store(weights_ptr + n, 0.0)
        if GRADIENT:
            _clear(z_ptr, stride_zn, BLOCK_V)


@triton.jit
def lce_grad_kernel(
    logits_ptr, labels_ptr, weights_ptr, lse_ptr, stride_zn, V, cap, HAS_CAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + n * stride_zn
    label, w = tl.load(labels_ptr + n), tl.load(weights_ptr + n)
    if (label != _IGNORE) & (w != 0.0):
        lse = tl.load(lse_ptr + n)
        _write_gradient(z_ptr, label, w, lse, lse, stride_zn, V, cap, HAS_CAP, BLOCK_V)
    else:
        _clear(z_ptr, stride_zn, BLOCK_V)


@triton.jit
def lce_scale_kernel(x_ptr, factor_ptr, y_ptr, num_elements, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < num_elements
    x = tl.load(x_ptr + i, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    factor = tl.load(factor_ptr).to(tl.float32)
    tl.store(y_ptr + i, narrow(x * factor, y_ptr.dtype.element_ty), mask=mask)


class RowStatistics:
    """What is known of each live row, (R,) each, filled chunk by chunk; `loss` with a Dynamic alone."""

    def __init__(self, num_rows: int, device: torch.device, has_loss: bool = False):
        self.nll, self.lse = (torch.empty(num_rows, device=device) for _ in range(2))  # fp32
        self.correct = torch.empty(num_rows, dtype=torch.int8, device=device)
        self.loss = torch.empty(num_rows, device=device) if has_loss else None

    def slice(self, start: int, end: int) -> dict[str, Any]:
        fields = {"nll": self.nll, "correct": self.correct, "lse": self.lse, "loss": self.loss}
        return {f"{name}_ptr": None if values is None else values[start:end] for name, values in fields.items()}


def lce_stats(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    stats: dict[str, Any],
    softcap: float,
    gradient: bool,
    dynamic: Dynamic | None = None,
) -> None:
    """Launches the statistics of logits (n, V) into a slice of RowStatistics; with `gradient` the logits become it.

    The stride of the logits' rows may pass V; the columns between belong to the kernel. `dynamic`: it replaces the
    weights by those that multiply the rows, and fills their loss.
    """
    arguments = (
        {"logits_ptr": logits, "labels_ptr": labels, "weights_ptr": weights} | stats | _settings(logits, softcap)
    )
    arguments |= {"GRADIENT": gradient, "LANE": LANE_BYTES // logits.element_size()}
    arguments |= {"KIND": "", "alpha": 0.0, "full_entropy": 0.0}
    if dynamic is not None:
        arguments |= {"KIND": dynamic.kind, "alpha": float(dynamic.alpha), "full_entropy": float(dynamic.full_entropy)}
    launch(lce_stats_kernel, (logits.shape[0],), arguments, num_warps=num_warps(logits))


def lce_grad(logits: Tensor, labels: Tensor, weights: Tensor, lse: Tensor, softcap: float) -> None:
    """Launches the gradient alone, over the logits, for weights that were only known after the statistics."""
    arguments = {"logits_ptr": logits, "labels_ptr": labels, "weights_ptr": weights, "lse_ptr": lse}
    arguments |= _settings(logits, softcap)
    launch(lce_grad_kernel, (logits.shape[0],), arguments, num_warps=num_warps(logits))


def lce_scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Launches `x * factor`, rounded once to `dtype`; x contiguous, factor ()."""
    y = torch.empty_like(x, dtype=dtype)
    arguments = {"x_ptr": x, "factor_ptr": factor, "y_ptr": y, "num_elements": x.numel(), "BLOCK": SCALE_BLOCK}
    launch(lce_scale_kernel, (triton.cdiv(x.numel(), SCALE_BLOCK),), arguments)
    return y


def num_warps(logits: Tensor) -> int:
    """Of a row's program, so few that the rows of the up to 64 warps of each processor stay within AT_WORK_BYTES."""
    rows = AT_WORK_BYTES // (num_processors(logits.device) * logits.shape[1] * logits.element_size())
    return 8 if rows >= 8 else 16 if rows >= 4 else 32


def block_size(logits: Tensor) -> int:
    """Logits that a program takes at a time."""
    return 32 * num_warps(logits) * THREAD_BYTES // logits.element_size()


def _settings(logits: Tensor, cap: float) -> dict[str, object]:
    return {
        "stride_zn": logits.stride(0),
        "V": logits.shape[1],
        "cap": float(cap),
        "HAS_CAP": cap > 0,
        "BLOCK_V": block_size(logits),
    }
