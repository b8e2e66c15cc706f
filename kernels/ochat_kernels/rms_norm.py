"""RMSNorm, alone and with the residual addition before it: y = x / sqrt(mean(x^2) + eps) * (offset + weight).

    y = rms_norm(x, weight, eps, offset=1.0)                    # (..., H) -> (..., H); Gemma's offset, others have none
    y, new_residual = add_rms_norm(x, residual, weight, eps)    # new_residual = x + residual
    y, y8, scale = rms_norm_fp8(x, weight, eps)                 # and y's rows in e4m3 (fp8.py), in the same pass
A program holds whole rows; every element crosses the memory bus once, in fp32 between. The backward is a fixed number
of programs that share the rows; each leaves one row of sums for dweight, added up in one fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.fp8 import empty_rows, magnitude, row_scale, to_fp8
from ochat_kernels.launch import check_floats, check_like, launch, num_processors, rows_of
from ochat_kernels.rounding import narrow

MAX_H = 16384  # a longer row of the backward's fp32 sums would not fit a processor's registers
TILE = 4096  # elements of a program at least: several rows where they are short
TILE_BWD = 256  # of the backward; more than two rows of a model's width leave too few registers for half of the warps
PAIR_H = 2048  # the widest rows that it takes in pairs
MAX_ROWS = 32
THREAD_BYTES = 32  # of a tile: two 16-byte accesses a thread


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, y8_ptr, scale_ptr, stride_xt, stride_rt, T, H, eps,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    h = tl.arange(0, BLOCK_H)[None, :]
    mask = (t < T) & (h < H)
    x = tl.load(x_ptr + t * stride_xt + h, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + t * stride_rt + h, mask=mask, other=0.0).to(tl.float32)
        rounded = narrow(x, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + t * H + h, rounded, mask=mask)
        x = rounded.to(tl.float32)  # the statistics are those of the stream that the next block sees
    weight = tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    if OFFSET != 0:
        weight += OFFSET
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    tl.store(rstd_ptr + t, rstd, mask=t < T)
    y = narrow(x * rstd * weight, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t * H + h, y, mask=mask)
    if y8_ptr is not None:
        y = y.to(tl.float32)
        scale = row_scale(tl.max(magnitude(y), axis=1, keep_dims=True))
        tl.store(scale_ptr + t, scale, mask=t < T)
        tl.store(y8_ptr + t * H + h, to_fp8(y, scale), mask=mask)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, stride_dyt, stride_dst, stride_xt, T, H,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < H
    dweight = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(program * ROWS, T, tl.num_programs(0) * ROWS):
        t = first + tl.arange(0, ROWS)[:, None]
        mask = (t < T) & inside[None, :]
        x_at, dy_at = x_ptr + t * stride_xt + h[None, :], dy_ptr + t * stride_dyt + h[None, :]
        rstd = tl.load(rstd_ptr + t, mask=t < T, other=0.0)
        x = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        product = x * rstd * dy
        if partial_ptr is not None:
            dweight += tl.sum(product, axis=0)  # a thread has the same columns of both rows
        weight = tl.load(weight_ptr + h, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        scaled = product * weight[None, :]
        if OFFSET != 0:
            scaled += product * OFFSET  # added to the weight first, here alone, it spills (seen at H = 5376)
        along = tl.sum(scaled, axis=1, keep_dims=True) / H
        # Kept over the reduction, the rows and their sums spill (seen at H = 16384) or halve the programs that fit:
        # they are read again, from L1. Other cache hints than above, or the compiler makes one load of the two.
        dy = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        weight = tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)
        if OFFSET != 0:
            weight += OFFSET
        dx = dy * weight[None, :]
        x = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = (dx - x * (rstd * along)) * rstd
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + t * stride_dst + h[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + t * H + h[None, :], narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + program * H + h, dweight, mask=inside)


def rms_norm_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Launches the forward: x (..., H), weight (H,) -> y (..., H) and 1 / sqrt(mean(x^2) + eps), (...) fp32."""
    y, _, rstd = _forward(x, None, weight, eps, offset)
    return y, rstd


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward after the addition: y (..., H), x + residual (..., H), and the sum's rstd (...) fp32."""
    return _forward(x, residual, weight, eps, offset)


def rms_norm_fp8_fwd(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rms_norm_fwd, and y's rows in e4m3 with their scales."""
    rows8 = empty_rows(x)
    y, _, rstd = _forward(x, None, weight, eps, offset, rows8)
    return y, rstd, *rows8


def add_rms_norm_fp8_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """add_rms_norm_fwd, and y's rows in e4m3 with their scales."""
    rows8 = empty_rows(x)
    return *_forward(x, residual, weight, eps, offset, rows8), *rows8


def rms_norm_bwd(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Launches the backward: the gradients of x (..., H) and of weight (H,) (empty unless asked for) from that of y.

    x is what was normalised; `grad_sum`, where there is one, is the gradient that reaches x without passing the norm.
    """
    dx = x.new_empty(x.shape)
    grad, x, weight = _matrix(grad), _matrix(x), rows_of(weight)
    grad_sum = None if grad_sum is None else _matrix(grad_sum)
    # by the wider of the two: a weight in fp32 with eight elements of x in bf16 spills
    itemsize = max(x.element_size(), weight.element_size())
    rows, block, warps = _tile(x.shape[1], itemsize, TILE_BWD, least=2 if x.shape[1] <= PAIR_H else 1)
    T, H = x.shape
    programs = _programs(T, rows, warps, x.device)
    partial = x.new_empty(programs, H, dtype=torch.float32) if need_weight else None
    arguments = {"dy_ptr": grad, "dsum_ptr": grad_sum, "x_ptr": x, "weight_ptr": weight, "rstd_ptr": rstd}
    arguments |= {"dx_ptr": dx, "partial_ptr": partial, "stride_dyt": grad.stride(0)}
    arguments |= {"stride_dst": 0 if grad_sum is None else grad_sum.stride(0), "stride_xt": x.stride(0)}
    arguments |= {"T": T, "H": H, "OFFSET": offset, "ROWS": rows, "BLOCK_H": block}
    launch(rms_norm_bwd_kernel, (programs,), arguments, num_warps=warps)
    return dx, weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    rows8: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the sum (y again where there is no residual) and rstd; `rows8`: to fill with y's rows in e4m3 and scales."""
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = y if residual is None else x.new_empty(x.shape)
    x, weight = _matrix(x), rows_of(weight)
    residual = None if residual is None else _matrix(residual)
    rows, block, warps = _tile(x.shape[1], x.element_size(), TILE)
    T, H = x.shape
    arguments = {"x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "y_ptr": y, "sum_ptr": total}
    arguments |= {
        "rstd_ptr": rstd,
        "y8_ptr": rows8[0],
        "scale_ptr": rows8[1],
        "stride_xt": x.stride(0),
        "stride_rt": 0 if residual is None else residual.stride(0),
    }
    arguments |= {"T": T, "H": H, "eps": eps, "OFFSET": offset, "ROWS": rows, "BLOCK_H": block}
    launch(rms_norm_fwd_kernel, (triton.cdiv(T, rows),), arguments, num_warps=warps)
    return y, total, rstd


def _matrix(x: Tensor) -> Tensor:
    """(..., H) -> (T, H). Inside the operators: were these views in autograd's graph, x and residual could get one
    gradient under two names, and adding a second one in place to either would change both."""
    return rows_of(x.reshape(-1, x.shape[-1]))


def _tile(H: int, itemsize: int, size: int, least: int = 1) -> tuple[int, int, int]:
    """Rows (`least`, or as many as have `size` elements) and columns of a program's tile, and its warps."""
    block = triton.next_power_of_2(H)
    rows = min(max(size // block, least), MAX_ROWS)
    thread_bytes = THREAD_BYTES if H * itemsize % 16 == 0 else THREAD_BYTES // 2  # an address for every element
    return rows, block, min(max(rows * block * itemsize // (32 * thread_bytes), 1), 32)


def _programs(T: int, rows: int, warps: int, device: torch.device) -> int:
    """Programs of the backward, never more than there are tiles: as many as the GPU runs at once.

    Compiled for sm_90, one or two rows take up to 64 registers a thread: 32 warps a processor; more take up to 120."""
    return min(triton.cdiv(T, rows), num_processors(device) * max((32 if rows <= 2 else 16) // warps, 1))


def _check(x: Tensor, weight: Tensor) -> None:
    check_floats("x", x)
    check_floats("weight", weight)
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_H:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., H) with H from 1 to {MAX_H}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected H, the columns of x, {tuple(x.shape[-1:])}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weight is {weight.dtype}: expected x's {x.dtype} or float32")
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}: expected {x.device}, as x is")


_rms_norm = torch.library.custom_op("ochat_kernels::rms_norm", rms_norm_fwd, mutates_args=())
_add_rms_norm = torch.library.custom_op("ochat_kernels::add_rms_norm", add_rms_norm_fwd, mutates_args=())
_rms_norm_fp8 = torch.library.custom_op("ochat_kernels::rms_norm_fp8", rms_norm_fp8_fwd, mutates_args=())
_add_rms_norm_fp8 = torch.library.custom_op("ochat_kernels::add_rms_norm_fp8", add_rms_norm_fp8_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::rms_norm_bwd", rms_norm_bwd, mutates_args=())


@_rms_norm.register_fake
def _(x, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_rms_norm_fp8.register_fake
def _(x, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32), *empty_rows(x)


@_add_rms_norm_fp8.register_fake
def _(x, residual, weight, eps, offset):
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd, *empty_rows(x)


@_backward.register_fake
def _(grad, grad_sum, x, weight, rstd, offset, need_weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)


def _save(ctx, inputs, output):
    x, weight, _, ctx.offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for rows in e4m3


def _differentiate(ctx, grad, *_):
    need_weight = ctx.needs_input_grad[1]
    dx, dweight = _backward(grad, None, *ctx.saved_tensors, ctx.offset, need_weight)
    return dx, dweight if need_weight else None, None, None


def _save_sum(ctx, inputs, output):
    total, rstd = output[1:3]
    ctx.offset = inputs[4]
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # the sum of the last block has no gradient of its own: no zeros to read


def _differentiate_sum(ctx, grad, grad_sum, *_):
    if grad is None:
        return grad_sum, grad_sum, None, None, None
    need_weight = ctx.needs_input_grad[2]
    dx, dweight = _backward(grad, grad_sum, *ctx.saved_tensors, ctx.offset, need_weight)
    return dx, dx, dweight if need_weight else None, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm.register_autograd(_differentiate_sum, setup_context=_save_sum)
_rms_norm_fp8.register_autograd(_differentiate, setup_context=_save)
_add_rms_norm_fp8.register_autograd(_differentiate_sum, setup_context=_save_sum)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension.

    Args: x (..., H) fp32, bf16 or fp16, H up to 16384, rows of any stride; weight (H,) of x's dtype or fp32, to which
    offset is added in fp32.
    Returns: x's shape and dtype, contiguous. Raises: ValueError for another dtype, shape or device.
    Costs: 4 T H FLOPs for T rows, backward 8 T H; forward moves 2 T H elements, backward 3 T H; saves x, weight and T
    fp32 numbers; no sync. Two runs give the same bits. Leading dimensions that no one stride spans are copied.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    _check(x, weight)
    y, _ = _rms_norm(x, weight, eps, offset)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """`(rms_norm(x + residual), x + residual)`: the sum rounded to x's dtype, the norm that of the rounded sum.

    Args: x and residual (..., H) of one shape and dtype, else as in rms_norm. Returns: (y, new_residual), contiguous.
    Raises: ValueError for another dtype, shape or device.
    Costs: 5 T H FLOPs, backward 9 T H; forward moves 4 T H elements, backward 4 T H (3 T H where new_residual has no
    gradient); saves new_residual, weight and T fp32 numbers, but neither x nor residual; no sync. Deterministic.
    """
    _check(x, weight)
    check_like("residual", residual, "x", x)
    y, total, _ = _add_rms_norm(x, residual, weight, eps, offset)
    return y, total


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, *quantize_rows(y))` for y = rms_norm(x), x (T, H), bit for bit: (y, y8, scale).

    y has the gradient, y8 and scale none. Args, Raises: as in rms_norm. Costs: those of rms_norm, and T H bytes more.
    """
    check_floats("x", x, dims=2)
    _check(x, weight)
    y, _, y8, scale = _rms_norm_fp8(x, weight, eps, offset)
    return y, y8, scale


def add_rms_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(y, y8, scale, new_residual)`: add_rms_norm, whose y is quantised as in rms_norm_fp8."""
    check_floats("x", x, dims=2)
    _check(x, weight)
    check_like("residual", residual, "x", x)
    y, total, _, y8, scale = _add_rms_norm_fp8(x, residual, weight, eps, offset)
    return y, y8, scale, total
