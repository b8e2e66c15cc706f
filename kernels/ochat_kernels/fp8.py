"""Products of e4m3 numbers with a scale for each row: quantise rows, quantise a weight transposed, multiply.

    x8, x_scale = quantize_rows(x);  w8, w_scale = quantize_rows(weight)      # (T, in), (out, in)
    y = scaled_product(x8, x_scale, w8, w_scale)                              # x @ weight.T
    dy8, dy_scale = quantize_rows(dy, w_scale)                                # dy times the scales of weight's rows
    dx = scaled_product(dy8, dy_scale, quantize_transposed(weight, w_scale))  # dy @ weight, of the same w8

reference_fp8.py is the definition. A card multiplies rows of both operands only, hence the transposed copy: it is made
where it is needed, in one pass, and no copy is kept. Cards from Hopper on; no operator here has a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import check_device, check_floats, launch, rows_of
from ochat_kernels.reference_fp8 import FP8, LARGEST, SMALLEST
from ochat_kernels.rounding import narrow

BLOCK_H = 4096  # of a row that are in registers at a time
TILE = 4096  # elements of a program at least: several rows where they are short
MAX_ROWS = 32
BLOCK = 64  # rows and columns of a tile that is transposed

_LARGEST, _SMALLEST, _FP8 = tl.constexpr(LARGEST), tl.constexpr(SMALLEST), tl.constexpr(tl.float8e4nv)


@triton.jit
def magnitude(x):
    """|x|, infinite where x is NaN, which a maximum would pass over."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def row_scale(largest):
    """The scale of rows with such largest magnitudes."""
    return tl.maximum(largest, _SMALLEST) * (1 / _LARGEST)


@triton.jit
def to_fp8(x, scale):
    """fp32 `x` over its rows' scales in e4m3."""
    return narrow(x * tl.div_rn(1.0, scale), _FP8)


@triton.jit
def quantize_rows_kernel(
    x_ptr, factors_ptr, x8_ptr, scale_ptr, stride_xt, T, H, ROWS: tl.constexpr, BLOCK_H: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    x_row, x8_row = x_ptr + t * stride_xt, x8_ptr + t * H
    largest = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :]
        mask = (t < T) & (h < H)
        x = tl.load(x_row + h, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if factors_ptr is not None:
            x *= tl.load(factors_ptr + h, mask=h < H, other=0.0, eviction_policy="evict_last")
        largest = tl.maximum(largest, tl.max(magnitude(x), axis=1, keep_dims=True))
    scale = row_scale(largest)
    tl.store(scale_ptr + t, scale, mask=t < T)
    for start in range(0, H, BLOCK_H):  # again, from the cache
        h = start + tl.arange(0, BLOCK_H)[None, :]
        mask = (t < T) & (h < H)
        x = tl.load(x_row + h, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if factors_ptr is not None:
            x *= tl.load(factors_ptr + h, mask=h < H, other=0.0)
        tl.store(x8_row + h, to_fp8(x, scale), mask=mask)


@triton.jit
def quantize_transposed_kernel(weight_ptr, scale_ptr, out_ptr, stride_wo, OUT, IN, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = (o < OUT)[:, None] & (i < IN)[None, :]
    weight = tl.load(weight_ptr + o[:, None] * stride_wo + i[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + o, mask=o < OUT, other=1.0)
    w8 = to_fp8(weight, scale[:, None])
    tl.store(out_ptr + i[:, None] * OUT + o[None, :], tl.trans(w8), mask=tl.trans(mask))


def empty_rows(like: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the rows of (T, H) in e4m3, and for their scales."""
    return like.new_empty(like.shape, dtype=FP8), like.new_empty(like.shape[0], 1, dtype=torch.float32)


def rows_fwd(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launches the quantisation of rows: x (T, H) -> (T, H) e4m3, (T, 1) fp32."""
    x = rows_of(x)
    T, H = x.shape
    x8, scale = empty_rows(x)
    block = min(triton.next_power_of_2(H), BLOCK_H)
    rows = min(max(TILE // block, 1), MAX_ROWS)
    warps = min(max(rows * block * x.element_size() // 1024, 1), 16)  # 32 bytes of the tile a thread
    arguments = {"x_ptr": x, "factors_ptr": factors, "x8_ptr": x8, "scale_ptr": scale, "stride_xt": x.stride(0)}
    arguments |= {"T": T, "H": H, "ROWS": rows, "BLOCK_H": block}
    launch(quantize_rows_kernel, (triton.cdiv(T, rows),), arguments, num_warps=warps)
    return x8, scale


def transposed_fwd(weight: Tensor, scale: Tensor) -> Tensor:
    """Launches the transposed quantisation: weight (out, in), scale (out, 1) -> (in, out) e4m3."""
    weight = rows_of(weight)
    OUT, IN = weight.shape
    w8 = weight.new_empty(IN, OUT, dtype=FP8)
    arguments = {"weight_ptr": weight, "scale_ptr": scale, "out_ptr": w8, "stride_wo": weight.stride(0)}
    arguments |= {"OUT": OUT, "IN": IN, "BLOCK": BLOCK}
    launch(quantize_transposed_kernel, (triton.cdiv(OUT, BLOCK), triton.cdiv(IN, BLOCK)), arguments)
    return w8


_quantize_rows = torch.library.custom_op("ochat_kernels::quantize_rows", rows_fwd, mutates_args=())
_quantize_transposed = torch.library.custom_op("ochat_kernels::quantize_transposed", transposed_fwd, mutates_args=())


@_quantize_rows.register_fake
def _(x, factors):
    return empty_rows(x)


@_quantize_transposed.register_fake
def _(weight, scale):
    return weight.new_empty(weight.shape[1], weight.shape[0], dtype=FP8)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(e4m3(x / scale), scale)` with `scale = max |x| / 448` of each row; x is multiplied by `factors` first.

    Args: x (T, H) fp32, bf16 or fp16, rows of any stride; factors (H, 1) fp32, the scales of a weight's rows.
    Returns: (T, H) e4m3, (T, 1) fp32, contiguous. With a NaN or an infinity its row of a product is not finite.
    Raises: ValueError for another dtype, shape or device. Costs: 3 T H FLOPs; T H elements read, T H bytes written; no
    sync, no gradient.
    """
    check_floats("x", x, dims=2)
    if factors is not None:
        _check_scale("factors", factors, x.shape[1], "a number for each column of x")
    return _quantize_rows(x, factors)


def quantize_transposed(weight: Tensor, scale: Tensor) -> Tensor:
    """`quantize_rows(weight)[0]` transposed, from the scales that it gave.

    Args: weight (out, in) fp32, bf16 or fp16, rows of any stride; scale (out, 1) fp32. Returns: (in, out) e4m3,
    contiguous. Raises: ValueError for another dtype, shape or device. Costs: out in elements read, as many bytes
    written; no sync, no gradient.
    """
    check_floats("weight", weight, dims=2)
    _check_scale("scale", scale, weight.shape[0], "a number for each row of weight")
    return _quantize_transposed(weight, scale)


def scaled_product(
    a8: Tensor, a_scale: Tensor, b8: Tensor, b_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`(a_scale a8) (b_scale b8)^T + bias` in bf16, by torch's product (cuBLAS, CUTLASS).

    Args: a8 (T, n) and b8 (m, n) e4m3, contiguous, on a card with n and m multiples of 16; a_scale (T, 1), b_scale
    (m, 1) fp32, without which it is 1; bias (m,) bf16. Returns: (T, m) bf16. Costs: 2 T n m FLOPs at the rate of e4m3;
    no sync. Sums stay in the tensor cores (fast accumulation): with fewer bits than fp32, far more than e4m3 has.
    """
    if not a8.shape[0]:
        return a8.new_empty(0, b8.shape[0], dtype=torch.bfloat16)
    b_scale = a_scale.new_ones(b8.shape[0], 1) if b_scale is None else b_scale
    options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return torch.ops.aten._scaled_mm(a8, b8.t(), a_scale, b_scale.t(), **options)


def _check_scale(name: str, scale: Tensor, count: int, what: str) -> None:
    if scale.shape != (count, 1) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(f"{name} is {scale.dtype} {tuple(scale.shape)}: expected float32 {(count, 1)}, {what}")
    check_device(name, scale)
