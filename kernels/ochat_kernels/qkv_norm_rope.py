"""RMSNorm of every head of q and k and then their rotation, in one pass: what Qwen3 and Gemma 3 do before attention.

    q, k, v = qkv_norm_rope(qkv, q_weight, k_weight, cos, sin, N, K, eps)   # qkv (T, (N + 2K) D), cos and sin (T, d/2)
A program takes a few tokens and walks over the heads; a head's three parts, the halves of its pairs and what is not
turned, are read once, in fp32 between, and written once; v is copied. The backward turns the gradient back and is then
that of a norm; a fixed number of programs share the tokens, and each leaves its sums for both weights, added in a fixed
order. It writes one tensor, the gradient of the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import check_floats, launch, num_processors, rows_of
from ochat_kernels.rope import NUM_WARPS, Heads, check_product, copy_heads, head_blocks, new_heads
from ochat_kernels.rounding import narrow

PROGRAMS = 4  # of the backward, for each of the card's processors: what its registers let run at once


@triton.jit
def qkv_norm_rope_fwd_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr, yv_ptr, rstd_ptr,
    stride_t, T, eps, OFFSET: tl.constexpr, N, K, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    i = tl.arange(0, BLOCK_I)[None, None, :]
    cos = tl.load(cos_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
    sin = tl.load(sin_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
    rstd_ptr += t * (N + K)
    _norm_and_turn(qkv_ptr, q_weight_ptr, yq_ptr, rstd_ptr, stride_t, t, i, cos, sin, T, eps,
                   OFFSET, N, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip
    _norm_and_turn(qkv_ptr + N * D, k_weight_ptr, yk_ptr, rstd_ptr + N, stride_t, t, i, cos, sin, T, eps,
                   OFFSET, K, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip
    copy_heads(qkv_ptr + (N + K) * D, yv_ptr, stride_t, D, K * D, D, t, t < T, K, D, BLOCK_H, BLOCK_D)


@triton.jit
def _norm_and_turn(x_ptr, weight_ptr, y_ptr, rstd_at, stride_xt, t, i, cos, sin, T, eps,
                   OFFSET: tl.constexpr, HEADS, HALF: tl.constexpr, REST: tl.constexpr,
                   BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Every head of x, at tokens `t` (BLOCK_T, 1, 1) and pairs `i` (1, 1, BLOCK_I), into y (T, HEADS, D)."""
    D: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    r = 2 * HALF + tl.arange(0, BLOCK_R)[None, None, :]
    first_weight, second_weight = _scale(weight_ptr, i, HALF, OFFSET), _scale(weight_ptr + HALF, i, HALF, OFFSET)
    for start in range(0, HEADS, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :, None]
        inside = (t < T) & (h < HEADS)
        mask = inside & (i < HALF)
        x_row, y_row = x_ptr + t * stride_xt + h * D, y_ptr + t * (HEADS * D) + h * D
        first = tl.load(x_row + i, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_row + HALF + i, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(first * first + second * second, axis=2, keep_dims=True)
        if REST > 0:
            rest = tl.load(x_row + r, mask=inside & (r < D), other=0.0).to(tl.float32)
            squares += tl.sum(rest * rest, axis=2, keep_dims=True)
        rstd = tl.rsqrt(squares / D + eps)
        tl.store(rstd_at + h, rstd, mask=inside)
        first, second = first * rstd * first_weight, second * rstd * second_weight
        tl.store(y_row + i, narrow(first * cos - second * sin, dtype), mask=mask)
        tl.store(y_row + HALF + i, narrow(second * cos + first * sin, dtype), mask=mask)
        if REST > 0:
            rest *= rstd * _scale(weight_ptr, r, D, OFFSET)
            tl.store(y_row + r, narrow(rest, dtype), mask=inside & (r < D))


@triton.jit
def qkv_norm_rope_bwd_kernel(
    dyq_ptr, dyk_ptr, dyv_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dqkv_ptr, partial_ptr,
    stride_dyqt, stride_dyqh, stride_dykt, stride_dykh, stride_dyvt, stride_dyvh, stride_t, T,
    OFFSET: tl.constexpr, N, K, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    stride_dt = (N + 2 * K) * D
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)[:, None, None]
        copy_heads(dyv_ptr, dqkv_ptr + (N + K) * D, stride_dyvt, stride_dyvh, stride_dt, D, t, t < T,
                   K, D, BLOCK_H, BLOCK_D)  # fmt: skip
    _turn_back(dyq_ptr, qkv_ptr, q_weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dqkv_ptr, partial_ptr,
               stride_dyqt, stride_dyqh, stride_t, stride_dt, T, OFFSET, N, N + K, HALF, REST,
               BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_R)  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += D
    _turn_back(dyk_ptr, qkv_ptr + N * D, k_weight_ptr, cos_ptr, sin_ptr, rstd_ptr + N, dqkv_ptr + N * D, partial_ptr,
               stride_dykt, stride_dykh, stride_t, stride_dt, T, OFFSET, K, N + K, HALF, REST,
               BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_R)  # fmt: skip


@triton.jit
def _turn_back(dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, partial_ptr,
               stride_dyt, stride_dyh, stride_xt, stride_dxt, T, OFFSET: tl.constexpr,
               HEADS, ALL_HEADS, HALF: tl.constexpr, REST: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """The gradient of x, heads of D elements that follow one another, at this program's tokens, and their sums (D,) for
    the weight."""
    D: tl.constexpr = 2 * HALF + REST
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    i = tl.arange(0, BLOCK_I)[None, None, :]
    r = 2 * HALF + tl.arange(0, BLOCK_R)[None, None, :]
    first_weight, second_weight = _scale(weight_ptr, i, HALF, OFFSET), _scale(weight_ptr + HALF, i, HALF, OFFSET)
    first_sum = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_I), tl.float32)
    second_sum = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_I), tl.float32)
    rest_sum = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_R), tl.float32)
    for begin in range(tl.program_id(0).to(tl.int64) * BLOCK_T, T, tl.num_programs(0) * BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)[:, None, None]
        cos = tl.load(cos_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
        sin = tl.load(sin_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
        for start in range(0, HEADS, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)[None, :, None]
            inside = (t < T) & (h < HEADS)
            mask = inside & (i < HALF)
            dy_row = dy_ptr + t * stride_dyt + h.to(tl.int64) * stride_dyh
            x_row, dx_row = x_ptr + t * stride_xt + h * D, dx_ptr + t * stride_dxt + h * D
            rstd = tl.load(rstd_ptr + t * ALL_HEADS + h, mask=inside, other=0.0)
            first_dy = tl.load(dy_row + i, mask=mask, other=0.0).to(tl.float32)
            second_dy = tl.load(dy_row + HALF + i, mask=mask, other=0.0).to(tl.float32)
            first_dz = first_dy * cos + second_dy * sin
            second_dz = second_dy * cos - first_dy * sin
            first = tl.load(x_row + i, mask=mask, other=0.0).to(tl.float32) * rstd
            second = tl.load(x_row + HALF + i, mask=mask, other=0.0).to(tl.float32) * rstd
            if partial_ptr is not None:
                first_sum += first * first_dz
                second_sum += second * second_dz
            first_dz *= first_weight
            second_dz *= second_weight
            along = tl.sum(first * first_dz + second * second_dz, axis=2, keep_dims=True)
            if REST > 0:
                rest_dz = tl.load(dy_row + r, mask=inside & (r < D), other=0.0).to(tl.float32)
                rest = tl.load(x_row + r, mask=inside & (r < D), other=0.0).to(tl.float32) * rstd
                if partial_ptr is not None:
                    rest_sum += rest * rest_dz
                rest_dz *= _scale(weight_ptr, r, D, OFFSET)
                along += tl.sum(rest * rest_dz, axis=2, keep_dims=True)
            along /= D
            tl.store(dx_row + i, narrow((first_dz - first * along) * rstd, dtype), mask=mask)
            tl.store(dx_row + HALF + i, narrow((second_dz - second * along) * rstd, dtype), mask=mask)
            if REST > 0:
                tl.store(dx_row + r, narrow((rest_dz - rest * along) * rstd, dtype), mask=inside & (r < D))
    if partial_ptr is not None:
        tl.store(partial_ptr + i, _over_heads(first_sum), mask=i < HALF)
        tl.store(partial_ptr + HALF + i, _over_heads(second_sum), mask=i < HALF)
        if REST > 0:
            tl.store(partial_ptr + r, _over_heads(rest_sum), mask=r < D)


@triton.jit
def _scale(weight_ptr, i, END: tl.constexpr, OFFSET: tl.constexpr):
    """offset + weight at `i`, below END."""
    weight = tl.load(weight_ptr + i, mask=i < END, other=0.0).to(tl.float32)
    if OFFSET != 0:
        weight += OFFSET
    return weight


@triton.jit
def _over_heads(x):
    """(tokens, heads, n) -> (1, 1, n)."""
    return tl.sum(tl.sum(x, axis=0, keep_dims=True), axis=1, keep_dims=True)


def qkv_norm_rope_fwd(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int,
    eps: float, offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the forward: q (T, N, D) and k (T, K, D), normalised and turned, v (T, K, D), and
    1 / sqrt(mean(x^2) + eps) of every head of q and k, (T, N + K) fp32."""
    results = new_heads(qkv, num_heads, num_kv_heads)
    rstd = qkv.new_empty(qkv.shape[0], num_heads + num_kv_heads, dtype=torch.float32)
    shared, blocks = _arguments(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, offset)
    arguments = shared | {"rstd_ptr": rstd, "eps": eps}
    arguments |= {f"y{name}_ptr": result for name, result in zip("qkv", results, strict=True)}
    grid = (triton.cdiv(qkv.shape[0], blocks["BLOCK_T"]),)
    launch(qkv_norm_rope_fwd_kernel, grid, arguments | blocks, num_warps=NUM_WARPS)
    return *results, rstd


def qkv_norm_rope_bwd(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor,
    sin: Tensor, rstd: Tensor, offset: float, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: the gradients of the product (T, (N + 2K) D) and of the weights (D,) (empty unless asked
    for) from those of what qkv_norm_rope_fwd returned."""
    (T, N, D), K = grad_q.shape, grad_k.shape[1]
    packed = qkv.new_empty(qkv.shape)
    shared, blocks = _arguments(qkv, q_weight, k_weight, cos, sin, N, K, offset)
    programs = min(triton.cdiv(T, blocks["BLOCK_T"]), num_processors(qkv.device) * PROGRAMS)
    partial = qkv.new_empty(programs, 2, D, dtype=torch.float32) if need_weights else None
    arguments = shared | {"rstd_ptr": rstd, "dqkv_ptr": packed, "partial_ptr": partial}
    for name, gradient in zip("qkv", map(rows_of, (grad_q, grad_k, grad_v)), strict=True):
        arguments |= {f"dy{name}_ptr": gradient}
        arguments |= {f"stride_dy{name}t": gradient.stride(0), f"stride_dy{name}h": gradient.stride(1)}
    launch(qkv_norm_rope_bwd_kernel, (programs,), arguments | blocks, num_warps=NUM_WARPS)
    if partial is None:
        return packed, q_weight.new_empty(0), k_weight.new_empty(0)
    q_sums, k_sums = partial.sum(0)
    # a copy each: one would be a view of the other's memory where no dtype is changed
    return packed, q_sums.to(q_weight.dtype, copy=True), k_sums.to(k_weight.dtype, copy=True)


def _arguments(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int,
    offset: float,
) -> tuple[dict[str, object], dict[str, int]]:  # fmt: skip
    """What both kernels take, and their blocks."""
    qkv, half, D = rows_of(qkv), cos.shape[1], qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    arguments: dict[str, object] = {"qkv_ptr": qkv, "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    arguments |= {"q_weight_ptr": rows_of(q_weight), "k_weight_ptr": rows_of(k_weight), "OFFSET": offset}
    arguments |= {"stride_t": qkv.stride(0), "T": qkv.shape[0], "N": num_heads, "K": num_kv_heads}
    arguments |= {"HALF": half, "REST": D - 2 * half}
    return arguments, head_blocks(num_kv_heads, D, half, qkv.element_size())


_forward = torch.library.custom_op("ochat_kernels::qkv_norm_rope", qkv_norm_rope_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::qkv_norm_rope_bwd", qkv_norm_rope_bwd, mutates_args=())


@_forward.register_fake
def _(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, eps, offset):
    rstd = qkv.new_empty(qkv.shape[0], num_heads + num_kv_heads, dtype=torch.float32)
    return *new_heads(qkv, num_heads, num_kv_heads), rstd


@_backward.register_fake
def _(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, rstd, offset, need_weights):
    weights = (weight.new_empty(weight.shape if need_weights else 0) for weight in (q_weight, k_weight))
    return qkv.new_empty(qkv.shape), *weights


def _save(ctx, inputs, output):
    *tensors, _, _, _, ctx.offset = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.mark_non_differentiable(output[3])


def _differentiate(ctx, grad_q, grad_k, grad_v, _):
    need_weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    packed, *dweights = _backward(grad_q, grad_k, grad_v, *ctx.saved_tensors, ctx.offset, need_weights)
    return packed, *(dweights if need_weights else (None, None)), *[None] * 6


_forward.register_autograd(_differentiate, setup_context=_save)


def qkv_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int,
    eps: float, offset: float = 0.0,
) -> Heads:  # fmt: skip
    """`qkv_rope` after `rms_norm` of each head of q by q_weight and of k by k_weight, rounded once.

    Args: qkv (T, (N + 2K) D), cos and sin (T, d/2) as in qkv_rope; q_weight and k_weight (D,) of its dtype or fp32, to
    which offset is added in fp32.
    Returns: q (T, N, D), k and v (T, K, D) of its dtype, contiguous. The gradient is one contiguous tensor, too.
    Raises: ValueError for another dtype, shape or device, and for cos or sin that require a gradient.
    Costs: 7 T (N + K) D FLOPs, backward 14; forward moves 2 T (N + 2K) D elements and T d fp32, backward T (3N + 5K) D
    and 2 T d; saves its inputs and T (N + K) fp32 numbers; no sync. Two runs give the same bits.
    """
    check_product(qkv, cos, sin, num_heads, num_kv_heads)
    D = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_floats(name, weight)
        if weight.shape != (D,) or weight.dtype not in (qkv.dtype, torch.float32):
            wanted = f"{qkv.dtype} or torch.float32 {(D,)}, for each head's elements"
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}: expected {wanted}")
    return _forward(qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, eps, offset)[:3]
