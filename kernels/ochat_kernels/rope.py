"""Rotary position embedding of packed q and k: pairs (i, i + d/2) of each head turned by their token's angle.

    q, k = rope(q, k, cos, sin)   # q (T, N, D), k (T, K, D), cos and sin (T, d/2): elements from d on stay
One launch turns both; a program takes a few tokens, reads their angles once and walks over the heads, in fp32.
The gradient is the rotation by the opposite angle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import check_floats, launch, rows_of
from ochat_kernels.rounding import narrow

NUM_WARPS = 4
# One access for each half of a thread's pairs: about 40 registers, so that enough programs wait for memory at once.
PAIR_BYTES = 16
MAX_BLOCK_H = 8  # divides the head counts of most models, so that no lane idles


@triton.jit
def _turn(x_ptr, y_ptr, stride_xt, stride_xh, stride_yt, stride_yh, t, tokens, i, cols, cos, sin,
          HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
          BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Every head of x, at tokens `t` (BLOCK_T, 1, 1) and pairs `i` (1, 1, BLOCK_I), into y; then their masks."""
    r = tl.arange(0, BLOCK_R)[None, None, :]
    for start in range(0, HEADS, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :, None]
        heads = tokens & (h < HEADS)
        mask = heads & cols
        h = h.to(tl.int64)
        x_row, y_row = x_ptr + t * stride_xt + h * stride_xh, y_ptr + t * stride_yt + h * stride_yh
        first = tl.load(x_row + i, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_row + HALF + i, mask=mask, other=0.0).to(tl.float32)
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        tl.store(y_row + i, narrow(first * cos - second * sin, dtype), mask=mask)
        tl.store(y_row + HALF + i, narrow(second * cos + first * sin, dtype), mask=mask)
        if REST > 0:
            rest = tl.load(x_row + 2 * HALF + r, mask=heads & (r < REST))
            tl.store(y_row + 2 * HALF + r, rest, mask=heads & (r < REST))


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_yqt, stride_yqh, stride_ykt, stride_ykh, T, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    i = tl.arange(0, BLOCK_I)[None, None, :]
    tokens, cols = t < T, i < HALF
    cos = tl.load(cos_ptr + t * HALF + i, mask=tokens & cols, other=0.0)
    sin = tl.load(sin_ptr + t * HALF + i, mask=tokens & cols, other=0.0)
    if INVERSE:
        sin = -sin
    _turn(q_ptr, yq_ptr, stride_qt, stride_qh, stride_yqt, stride_yqh, t, tokens, i, cols, cos, sin,
          N, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip
    _turn(k_ptr, yk_ptr, stride_kt, stride_kh, stride_ykt, stride_ykh, t, tokens, i, cols, cos, sin,
          K, HALF, REST, BLOCK_H, BLOCK_R)  # fmt: skip


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the forward: q (T, N, D) and k (T, K, D), turned."""
    return _launch(q, k, cos, sin, inverse=False)


def rope_bwd(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the backward: the gradients of q (T, N, D) and k (T, K, D) from those of what rope_fwd returned."""
    return _launch(grad_q, grad_k, cos, sin, inverse=True)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    yq, yk, (T, N, D), half = q.new_empty(q.shape), k.new_empty(k.shape), q.shape, cos.shape[1]
    q, k = rows_of(q), rows_of(k)
    arguments = {"q_ptr": q, "k_ptr": k, "yq_ptr": yq, "yk_ptr": yk}
    arguments |= {"cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    arguments |= {"stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_kt": k.stride(0)}
    arguments |= {"stride_kh": k.stride(1), "stride_yqt": yq.stride(0), "stride_yqh": yq.stride(1)}
    arguments |= {"stride_ykt": yk.stride(0), "stride_ykh": yk.stride(1), "T": T}
    arguments |= {"N": N, "K": k.shape[1], "HALF": half, "REST": D - 2 * half, "INVERSE": inverse}
    blocks = head_blocks(k.shape[1], D, half, q.element_size())
    launch(rope_kernel, (triton.cdiv(T, blocks["BLOCK_T"]),), arguments | blocks, num_warps=NUM_WARPS)
    return yq, yk


def head_blocks(num_kv_heads: int, D: int, half: int, element_size: int) -> dict[str, int]:
    """Tokens, heads, pairs and elements not turned of a tile: heads by k, whose count divides q's, then tokens until
    threads are busy."""
    pair_bytes = PAIR_BYTES if D * element_size % 16 == 0 else PAIR_BYTES // 4  # an address for every element
    elements = 32 * NUM_WARPS * pair_bytes // element_size
    block_i, block_r = triton.next_power_of_2(half), triton.next_power_of_2(max(1, D - 2 * half))
    width = max(block_i, block_r)
    block_h = min(triton.next_power_of_2(max(1, num_kv_heads)), MAX_BLOCK_H, max(1, elements // width))
    block_t = max(1, elements // (block_h * width))
    return {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_I": block_i, "BLOCK_R": block_r}


_forward = torch.library.custom_op("ochat_kernels::rope", rope_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::rope_bwd", rope_bwd, mutates_args=())


@_forward.register_fake
def _(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@_backward.register_fake
def _(grad_q, grad_k, cos, sin):
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx, grad_q, grad_k):
    return *_backward(grad_q, grad_k, *ctx.saved_tensors), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with the pairs (i, i + d/2) of each head turned by their token's angle, and all from d on as it was.

    Args: q (T, N, D) and k (T, K, D) fp32, bf16 or fp16, of any strides (views of a packed product as they are; copied
    if the last dimension is not dense); cos and sin (T, d/2) fp32, d from 2 to D.
    Returns: (T, N, D) and (T, K, D) of their dtype.
    Raises: ValueError for another dtype, shape or device, and for cos or sin that require a gradient.
    Costs: 3 T (N + K) d FLOPs; forward and backward each move 2 T (N + K) D elements and T d fp32; saves cos and sin
    alone; no sync.
    Source: Su et al. 2021, arXiv:2104.09864; the pairs are those of GPT-NeoX and Llama checkpoints.
    """
    check_heads(q, k, cos, sin)
    return _forward(q, k, cos, sin)


def check_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """ValueError for heads and angles that don't fit each other."""
    check_floats("q", q, dims=3)
    check_floats("k", k, dims=3)
    (T, _, D), expected = q.shape, (q.shape[0], k.shape[1], q.shape[2])
    if D < 2:
        raise ValueError(f"q has heads of {D} elements: expected at least 2, a pair")
    if k.shape != expected or k.dtype != q.dtype or k.device != q.device:
        raise ValueError(
            f"k is {k.dtype} {tuple(k.shape)} on {k.device}: expected {q.dtype} {expected} on {q.device}, as q is"
        )
    for name, x in (("cos", cos), ("sin", sin)):
        fits = x.dim() == 2 and x.shape[0] == T and 1 <= x.shape[1] <= D // 2 and x.shape == cos.shape
        if not fits or x.dtype != torch.float32 or x.device != q.device:
            wanted = f"torch.float32 {(T, D // 2)} on {q.device}, or fewer columns, as many in cos and sin"
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}: expected {wanted}")
        if x.requires_grad:
            raise ValueError(f"{name} requires a gradient and rope gives it none: pass {name}.detach()")
