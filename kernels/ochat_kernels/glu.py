"""Gated linear units over a fused gate/up product: y = f(gate) * up; backward recomputes from its input.

    y = swiglu(gate_up)   # (T, 2F) -> (T, F), gate first
    y = geglu(gate_up)    # with gelu by its tanh approximation, as Gemma has it
    y, y8, scale = swiglu_fp8(gate_up)    # and y's rows in e4m3 (fp8.py), in the same pass
Both are x * sigmoid(u): silu has u = x, and gelu, x (1 + tanh(u / 2)) / 2, has u = sqrt(8 / pi) (x + 0.044715 x^3).
One program per row and block of F columns, or per row where it takes the row's scale; every element is read and written
once, in fp32 between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.fp8 import empty_rows, magnitude, row_scale, to_fp8
from ochat_kernels.launch import check_floats, launch, rows_of
from ochat_kernels.rounding import narrow

BLOCK_F = 1024  # 8 elements a thread: 16-byte accesses in bf16
BLOCK_ROW = 2048  # the same, where a program walks a row


@triton.jit
def glu_fwd_kernel(x_ptr, y_ptr, stride_xt, F, IS_GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    gate = tl.load(x_ptr + t * stride_xt + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * stride_xt + F + f, mask=mask, other=0.0).to(tl.float32)
    sigmoid, _ = _sigmoid(gate, IS_GELU)
    tl.store(y_ptr + t * F + f, narrow(gate * sigmoid * up, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def glu_fp8_fwd_kernel(x_ptr, y_ptr, y8_ptr, scale_ptr, stride_xt, F, IS_GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 0.0, tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = f < F
        gate = tl.load(x_ptr + t * stride_xt + f, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + t * stride_xt + F + f, mask=mask, other=0.0).to(tl.float32)
        sigmoid, _ = _sigmoid(gate, IS_GELU)
        y = narrow(gate * sigmoid * up, y_ptr.dtype.element_ty)
        tl.store(y_ptr + t * F + f, y, mask=mask)
        largest = tl.maximum(largest, tl.max(magnitude(y.to(tl.float32)), axis=0))
    scale = row_scale(largest)
    tl.store(scale_ptr + t, scale)
    tl.debug_barrier()  # y is read again, from the cache, by other threads perhaps
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = f < F
        y = tl.load(y_ptr + t * F + f, mask=mask, other=0.0).to(tl.float32)
        tl.store(y8_ptr + t * F + f, to_fp8(y, scale), mask=mask)


@triton.jit
def glu_bwd_kernel(x_ptr, dy_ptr, dx_ptr, stride_xt, stride_dyt, F, IS_GELU: tl.constexpr, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    gate = tl.load(x_ptr + t * stride_xt + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * stride_xt + F + f, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + t * stride_dyt + f, mask=mask, other=0.0).to(tl.float32)
    sigmoid, slope = _sigmoid(gate, IS_GELU)
    dgate = dy * up * sigmoid * (1.0 + slope * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dx_ptr + t * 2 * F + f, narrow(dgate, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + t * 2 * F + F + f, narrow(dup, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x, IS_GELU: tl.constexpr):
    """sigmoid(u) and x * du/dx."""
    if IS_GELU:
        cubic = 0.044715 * x * x
        scaled = 1.5957691216057308 * x  # by sqrt(8 / pi)
        return tl.sigmoid(scaled * (1.0 + cubic)), scaled * (1.0 + 3.0 * cubic)
    else:
        return tl.sigmoid(x), x


def glu_fwd(gate_up: Tensor, is_gelu: bool) -> Tensor:
    """Launches the forward: (T, 2F) -> (T, F)."""
    gate_up = rows_of(gate_up)
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(T, F)
    arguments = {"x_ptr": gate_up, "y_ptr": y, "stride_xt": gate_up.stride(0), "F": F}
    arguments |= {"IS_GELU": is_gelu, "BLOCK_F": BLOCK_F}
    launch(glu_fwd_kernel, (T, triton.cdiv(F, BLOCK_F)), arguments)
    return y


def glu_fp8_fwd(gate_up: Tensor, is_gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward that quantises: y (T, F), its rows in e4m3, their scales (T, 1) fp32."""
    gate_up = rows_of(gate_up)
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(T, F)
    y8, scale = empty_rows(y)
    arguments = {"x_ptr": gate_up, "y_ptr": y, "y8_ptr": y8, "scale_ptr": scale, "stride_xt": gate_up.stride(0)}
    arguments |= {"F": F, "IS_GELU": is_gelu, "BLOCK_F": BLOCK_ROW}
    launch(glu_fp8_fwd_kernel, (T,), arguments, num_warps=8)
    return y, y8, scale


def glu_bwd(gate_up: Tensor, grad: Tensor, is_gelu: bool) -> Tensor:
    """Launches the backward: the gradient of gate_up, (T, 2F), from that of y, (T, F)."""
    gate_up, grad = rows_of(gate_up), rows_of(grad)
    T, F = grad.shape
    dx = gate_up.new_empty(T, 2 * F)
    arguments = {"x_ptr": gate_up, "dy_ptr": grad, "dx_ptr": dx, "stride_xt": gate_up.stride(0)}
    arguments |= {"stride_dyt": grad.stride(0), "F": F, "IS_GELU": is_gelu, "BLOCK_F": BLOCK_F}
    launch(glu_bwd_kernel, (T, triton.cdiv(F, BLOCK_F)), arguments)
    return dx


_forward = torch.library.custom_op("ochat_kernels::glu", glu_fwd, mutates_args=())
_forward_fp8 = torch.library.custom_op("ochat_kernels::glu_fp8", glu_fp8_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::glu_bwd", glu_bwd, mutates_args=())


@_forward.register_fake
def _(gate_up, is_gelu):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_forward_fp8.register_fake
def _(gate_up, is_gelu):
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    return y, *empty_rows(y)


@_backward.register_fake
def _(gate_up, grad, is_gelu):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    gate_up, ctx.is_gelu = inputs
    ctx.save_for_backward(gate_up)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for rows in e4m3


def _differentiate(ctx, grad, *_):
    return _backward(*ctx.saved_tensors, grad, ctx.is_gelu), None


_forward.register_autograd(_differentiate, setup_context=_save)
_forward_fp8.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` with the gate in the first half of the columns.

    Args: gate_up (T, 2F) fp32, bf16 or fp16, rows of any stride. Returns: (T, F) of its dtype.
    Raises: ValueError for another dtype, shape or device.
    Costs: 5 T F FLOPs; forward moves 3 T F elements, backward 5 T F; saves its input alone; no sync.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    _check(gate_up)
    return _forward(gate_up, False)


def geglu(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up`, gelu(x) = `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`; all else as in swiglu.

    Costs: 10 T F FLOPs, else those of swiglu. Source: Hendrycks and Gimpel 2016, arXiv:1606.08415; transformers'
    "gelu_pytorch_tanh".
    """
    _check(gate_up)
    return _forward(gate_up, True)


def swiglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, *quantize_rows(y))` for y = swiglu(gate_up), bit for bit: (y, y8, scale).

    y has the gradient, y8 and scale none. Args, Raises: as in swiglu. Costs: those of swiglu, and T F bytes more.
    """
    _check(gate_up)
    return _forward_fp8(gate_up, False)


def geglu_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """geglu, quantised as in swiglu_fp8."""
    _check(gate_up)
    return _forward_fp8(gate_up, True)


def _check(gate_up: Tensor) -> None:
    check_floats("gate_up", gate_up, dims=2)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns: expected an even number, gate and up side by side")
