"""Rotary position embedding of q and k: pairs (i, i + d/2) of each head turned by their token's angle.

    q, k = rope(q, k, cos, sin)   # q (T, N, D), k (T, K, D), cos and sin (T, d/2): elements from d on stay
    q, k, v = qkv_rope(qkv, cos, sin, N, K)   # of one product (T, (N + 2K) D), which no result is a view of
One launch turns q and k, and copies v; a program takes a few tokens, reads their angles once and walks over the heads,
in fp32. The gradient is the rotation by the opposite angle, written into one tensor where the product was one.
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

Heads = tuple[Tensor, Tensor, Tensor]  # q (T, N, D), k and v (T, K, D)


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
def copy_heads(x_ptr, y_ptr, stride_xt, stride_xh, stride_yt, stride_yh, t, tokens, HEADS,
               D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Every head of x, at tokens `t` (BLOCK_T, 1, 1), into y as it is."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    for start in range(0, HEADS, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)[None, :, None]
        mask = tokens & (h < HEADS) & (d < D)
        h = h.to(tl.int64)
        x = tl.load(x_ptr + t * stride_xt + h * stride_xh + d, mask=mask)
        tl.store(y_ptr + t * stride_yt + h * stride_yh + d, x, mask=mask)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, yq_ptr, yk_ptr, yv_ptr, cos_ptr, sin_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_yqt, stride_yqh, stride_ykt, stride_ykh, stride_yvt, stride_yvh,
    T, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
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
    if v_ptr is not None:
        copy_heads(v_ptr, yv_ptr, stride_vt, stride_vh, stride_yvt, stride_yvh, t, tokens,
                   K, 2 * HALF + REST, BLOCK_H, BLOCK_D)  # fmt: skip


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the forward: q (T, N, D) and k (T, K, D), turned."""
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch((q, k, None), (*turned, None), cos, sin, inverse=False)
    return turned


def rope_bwd(grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the backward: the gradients of q (T, N, D) and k (T, K, D) from those of what rope_fwd returned."""
    gradients = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    _launch((grad_q, grad_k, None), (*gradients, None), cos, sin, inverse=True)
    return gradients


def qkv_rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward: q (T, N, D) and k (T, K, D), turned, and v (T, K, D) of a product (T, (N + 2K) D)."""
    parts = heads_of(rows_of(qkv), num_heads, num_kv_heads)
    results = new_heads(qkv, num_heads, num_kv_heads)
    _launch(parts, results, cos, sin, inverse=False)
    return results


def qkv_rope_bwd(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Launches the backward: the gradient (T, (N + 2K) D) of the product from those of what qkv_rope_fwd returned."""
    (T, N, D), K = grad_q.shape, grad_k.shape[1]
    packed = grad_q.new_empty(T, (N + 2 * K) * D)
    _launch((grad_q, grad_k, grad_v), heads_of(packed, N, K), cos, sin, inverse=True)
    return packed


def heads_of(qkv: Tensor, num_heads: int, num_kv_heads: int) -> Heads:
    """q, k and v as views of the product (T, (N + 2K) D)."""
    each = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = qkv.unflatten(1, (sum(each), qkv.shape[1] // sum(each))).split(each, dim=1)
    return q, k, v


def new_heads(qkv: Tensor, num_heads: int, num_kv_heads: int) -> Heads:
    """q, k and v, contiguous, with no values yet."""
    T, D = qkv.shape[0], qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(T, count, D) for count in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
) -> None:
    """Writes q and k (T, heads, D) turned, and v, if there, as it is, into the outputs, all of any strides."""
    (T, N, D), K, half = inputs[0].shape, inputs[1].shape[1], cos.shape[1]
    arguments: dict[str, object] = {"cos_ptr": cos.contiguous(), "sin_ptr": sin.contiguous()}
    for name, x, y in zip("qkv", inputs, outputs, strict=True):
        for side, tensor in ((name, None if x is None else rows_of(x)), (f"y{name}", y)):
            strides = (None, None) if tensor is None else tensor.stride()
            arguments |= {f"{side}_ptr": tensor, f"stride_{side}t": strides[0], f"stride_{side}h": strides[1]}
    arguments |= {"T": T, "N": N, "K": K, "HALF": half, "REST": D - 2 * half, "INVERSE": inverse}
    blocks = head_blocks(K, D, half, inputs[0].element_size())
    launch(rope_kernel, (triton.cdiv(T, blocks["BLOCK_T"]),), arguments | blocks, num_warps=NUM_WARPS)


def head_blocks(num_kv_heads: int, D: int, half: int, element_size: int) -> dict[str, int]:
    """Tokens, heads, pairs, elements not turned and all elements of a tile: heads by k, whose count divides q's, then
    tokens until threads are busy."""
    pairs = PAIR_BYTES // element_size if D * element_size % 16 == 0 else 1  # else an address for every element
    elements = 32 * NUM_WARPS * pairs
    block_i, block_r = triton.next_power_of_2(half), triton.next_power_of_2(max(1, D - 2 * half))
    width = max(block_i, block_r)
    block_h = min(triton.next_power_of_2(max(1, num_kv_heads)), MAX_BLOCK_H, max(1, elements // width))
    block_t = max(1, elements // (block_h * width))
    blocks = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_I": block_i, "BLOCK_R": block_r}
    return blocks | {"BLOCK_D": triton.next_power_of_2(D)}


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

_forward_of_product = torch.library.custom_op("ochat_kernels::qkv_rope", qkv_rope_fwd, mutates_args=())
_backward_of_product = torch.library.custom_op("ochat_kernels::qkv_rope_bwd", qkv_rope_bwd, mutates_args=())


@_forward_of_product.register_fake
def _(qkv, cos, sin, num_heads, num_kv_heads):
    return new_heads(qkv, num_heads, num_kv_heads)


@_backward_of_product.register_fake
def _(grad_q, grad_k, grad_v, cos, sin):
    return grad_q.new_empty(grad_q.shape[0], (grad_q.shape[1] + 2 * grad_k.shape[1]) * grad_q.shape[2])


def _save_angles(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _differentiate_product(ctx, grad_q, grad_k, grad_v):
    return _backward_of_product(grad_q, grad_k, grad_v, *ctx.saved_tensors), None, None, None, None


_forward_of_product.register_autograd(_differentiate_product, setup_context=_save_angles)


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


def qkv_rope(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> Heads:
    """q and k of one product, turned as `rope` turns them, and v: none is a view of the product.

    Args: qkv (T, (N + 2K) D) fp32, bf16 or fp16, the heads of q before those of k and of v, rows of any stride (copied
    if they are not dense); cos and sin (T, d/2) fp32, d from 2 to D.
    Returns: q (T, N, D), k and v (T, K, D) of its dtype, contiguous. The gradient is one contiguous tensor, too.
    Raises: ValueError for another dtype, shape or device, and for cos or sin that require a gradient.
    Costs: 3 T (N + K) d FLOPs; forward and backward each move 2 T (N + 2K) D elements and T d fp32; saves cos and sin
    alone, so that nothing keeps the product; no sync.
    Source: as rope.
    """
    check_product(qkv, cos, sin, num_heads, num_kv_heads)
    return _forward_of_product(qkv, cos, sin, num_heads, num_kv_heads)


def check_product(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    """ValueError for a product and angles that don't fit each other."""
    check_floats("qkv", qkv, dims=2)
    count = num_heads + 2 * num_kv_heads
    if min(num_heads, num_kv_heads) < 1 or qkv.shape[1] % count:
        heads = f"{num_heads} heads of q and {num_kv_heads} each of k and v"
        raise ValueError(f"qkv has rows of {qkv.shape[1]} elements: expected a multiple of {count}, for {heads}")
    q, k, _ = heads_of(qkv, num_heads, num_kv_heads)
    check_heads(q, k, cos, sin)


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
