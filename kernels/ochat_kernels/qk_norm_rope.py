"""RMSNorm of every head of q and k and then their rotation, in one pass: what Qwen3 and Gemma 3 do before attention.

    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps)   # q (T, N, D), k (T, K, D), cos and sin (T, d/2)
A program takes a few tokens and walks over the heads; a head's three parts, the halves of its pairs and what is not
turned, are read once, in fp32 between, and written once. The backward turns the gradient back and is then that of a
norm; a fixed number of programs share the tokens, and each leaves its sums for both weights, added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import check_floats, launch, num_processors, rows_of
from ochat_kernels.rope import NUM_WARPS, check_heads, head_blocks
from ochat_kernels.rounding import narrow

PROGRAMS = 4  # of the backward, for each of the card's processors: what its registers let run at once


@triton.jit
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, yq_ptr, yk_ptr, rstd_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, T, eps, OFFSET: tl.constexpr,
    N, K, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    i = tl.arange(0, BLOCK_I)[None, None, :]
    cos = tl.load(cos_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
    sin = tl.load(sin_ptr + t * HALF + i, mask=(t < T) & (i < HALF), other=0.0)
    rstd_ptr += t * (N + K)
    _norm_and_turn(q_ptr, q_weight_ptr, yq_ptr, rstd_ptr, stride_qt, stride_qh, t, i, cos, sin, T, eps,
                   OFFSET, N, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip
    _norm_and_turn(k_ptr, k_weight_ptr, yk_ptr, rstd_ptr + N, stride_kt, stride_kh, t, i, cos, sin, T, eps,
                   OFFSET, K, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip


@triton.jit
def _norm_and_turn(x_ptr, weight_ptr, y_ptr, rstd_at, stride_xt, stride_xh, t, i, cos, sin, T, eps,
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
        x_row, y_row = x_ptr + t * stride_xt + h.to(tl.int64) * stride_xh, y_ptr + t * (HEADS * D) + h * D
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
def qk_norm_rope_bwd_kernel(
    dyq_ptr, dyk_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dq_ptr, dk_ptr, partial_ptr,
    stride_dyqt, stride_dyqh, stride_dykt, stride_dykh, stride_qt, stride_qh, stride_kt, stride_kh, T,
    OFFSET: tl.constexpr, N, K, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF + REST
    if partial_ptr is not None:
        partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    _turn_back(dyq_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dq_ptr, partial_ptr,
               stride_dyqt, stride_dyqh, stride_qt, stride_qh, T, OFFSET, N, N + K, HALF, REST,
               BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_R)  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += D
    _turn_back(dyk_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, rstd_ptr + N, dk_ptr, partial_ptr,
               stride_dykt, stride_dykh, stride_kt, stride_kh, T, OFFSET, K, N + K, HALF, REST,
               BLOCK_T, BLOCK_H, BLOCK_I, BLOCK_R)  # fmt: skip


@triton.jit
def _turn_back(dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, partial_ptr,
               stride_dyt, stride_dyh, stride_xt, stride_xh, T, OFFSET: tl.constexpr,
               HEADS, ALL_HEADS, HALF: tl.constexpr, REST: tl.constexpr,
               BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """The gradient of x (T, HEADS, D) at this program's tokens, and their sums (D,) for the weight."""
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
            x_row = x_ptr + t * stride_xt + h.to(tl.int64) * stride_xh
            dx_row = dx_ptr + t * (HEADS * D) + h * D
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


def qk_norm_rope_fwd(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward: q (T, N, D) and k (T, K, D), normalised and turned, and 1 / sqrt(mean(x^2) + eps) of every
    head, (T, N + K) fp32."""
    yq, yk = q.new_empty(q.shape), k.new_empty(k.shape)
    rstd = q.new_empty(q.shape[0], q.shape[1] + k.shape[1], dtype=torch.float32)
    shared, blocks = _arguments(q, k, q_weight, k_weight, cos, sin, offset)
    arguments = shared | {"yq_ptr": yq, "yk_ptr": yk, "rstd_ptr": rstd, "eps": eps}
    grid = (triton.cdiv(q.shape[0], blocks["BLOCK_T"]),)
    launch(qk_norm_rope_fwd_kernel, grid, arguments | blocks, num_warps=NUM_WARPS)
    return yq, yk, rstd


def qk_norm_rope_bwd(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    rstd: Tensor, offset: float, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launches the backward: the gradients of q, of k and of the weights (D,) (empty unless asked for) from those of
    what qk_norm_rope_fwd returned."""
    dq, dk, grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape), rows_of(grad_q), rows_of(grad_k)
    shared, blocks = _arguments(q, k, q_weight, k_weight, cos, sin, offset)
    T, _, D = q.shape
    programs = min(triton.cdiv(T, blocks["BLOCK_T"]), num_processors(q.device) * PROGRAMS)
    partial = q.new_empty(programs, 2, D, dtype=torch.float32) if need_weights else None
    arguments = shared | {"dyq_ptr": grad_q, "dyk_ptr": grad_k, "rstd_ptr": rstd, "dq_ptr": dq, "dk_ptr": dk}
    arguments |= {"stride_dyqt": grad_q.stride(0), "stride_dyqh": grad_q.stride(1), "stride_dykt": grad_k.stride(0)}
    arguments |= {"stride_dykh": grad_k.stride(1), "partial_ptr": partial}
    launch(qk_norm_rope_bwd_kernel, (programs,), arguments | blocks, num_warps=NUM_WARPS)
    if partial is None:
        return dq, dk, q_weight.new_empty(0), k_weight.new_empty(0)
    q_sums, k_sums = partial.sum(0)
    # a copy each: one would be a view of the other's memory where no dtype is changed
    return dq, dk, q_sums.to(q_weight.dtype, copy=True), k_sums.to(k_weight.dtype, copy=True)


def _arguments(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, offset: float
) -> tuple[dict[str, object], dict[str, int]]:
    """What both kernels take, and their blocks."""
    q, k, (T, N, D), half = rows_of(q), rows_of(k), q.shape, cos.shape[1]
    arguments: dict[str, object] = {"q_ptr": q, "k_ptr": k, "cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    arguments |= {"q_weight_ptr": rows_of(q_weight), "k_weight_ptr": rows_of(k_weight), "OFFSET": offset}
    arguments |= {"stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_kt": k.stride(0)}
    arguments |= {"stride_kh": k.stride(1), "T": T, "N": N, "K": k.shape[1], "HALF": half, "REST": D - 2 * half}
    return arguments, head_blocks(k.shape[1], D, half, q.element_size())


_forward = torch.library.custom_op("ochat_kernels::qk_norm_rope", qk_norm_rope_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::qk_norm_rope_bwd", qk_norm_rope_bwd, mutates_args=())


@_forward.register_fake
def _(q, k, q_weight, k_weight, cos, sin, eps, offset):
    rstd = q.new_empty(q.shape[0], q.shape[1] + k.shape[1], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), rstd


@_backward.register_fake
def _(grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, rstd, offset, need_weights):
    weights = (weight.new_empty(weight.shape if need_weights else 0) for weight in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), *weights


def _save(ctx, inputs, output):
    *tensors, _, ctx.offset = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, grad_q, grad_k, _):
    need_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    dq, dk, *dweights = _backward(grad_q, grad_k, *ctx.saved_tensors, ctx.offset, need_weights)
    return dq, dk, *(dweights if need_weights else (None, None)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`rope(rms_norm(q, q_weight, eps, offset), rms_norm(k, k_weight, eps, offset), cos, sin)`, rounded once.

    Args: q (T, N, D), k (T, K, D), cos and sin (T, d/2) as in rope; q_weight and k_weight (D,) of q's dtype or fp32, to
    which offset is added in fp32.
    Returns: (T, N, D) and (T, K, D) of their dtype, contiguous.
    Raises: ValueError for another dtype, shape or device, and for cos or sin that require a gradient.
    Costs: 7 T (N + K) D FLOPs, backward 14; forward moves 2 T (N + K) D elements and T d fp32, backward 3 T (N + K) D
    and 2 T d (norm and rope apart: 4 and 5); saves its inputs and T (N + K) fp32 numbers; no sync. Two runs give the
    same bits.
    """
    check_heads(q, k, cos, sin)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_floats(name, weight)
        if weight.shape != q.shape[-1:] or weight.dtype not in (q.dtype, torch.float32):
            wanted = f"{q.dtype} or torch.float32 {tuple(q.shape[-1:])}, for each head's elements"
            raise ValueError(f"{name} is {weight.dtype} {tuple(weight.shape)}: expected {wanted}")
    turned_q, turned_k, _ = _forward(q, k, q_weight, k_weight, cos, sin, eps, offset)
    return turned_q, turned_k
