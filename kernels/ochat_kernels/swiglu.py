"""SwiGLU over a fused gate/up product: y = silu(gate) * up; backward recomputes from the input that it saves.

    y = swiglu(gate_up)   # (T, 2F) -> (T, F), gate first
One program per row and block of F columns; every element is read and written once, in fp32 between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ochat_kernels.launch import check_floats, launch, rows_of
from ochat_kernels.rounding import narrow

BLOCK_F = 1024  # 8 elements a thread: 16-byte accesses in bf16


@triton.jit
def swiglu_fwd_kernel(x_ptr, y_ptr, stride_xt, F, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    gate = tl.load(x_ptr + t * stride_xt + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * stride_xt + F + f, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + t * F + f, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(x_ptr, dy_ptr, dx_ptr, stride_xt, stride_dyt, F, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = f < F
    gate = tl.load(x_ptr + t * stride_xt + f, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * stride_xt + F + f, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + t * stride_dyt + f, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    tl.store(dx_ptr + t * 2 * F + f, narrow(dgate, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + t * 2 * F + F + f, narrow(dup, dx_ptr.dtype.element_ty), mask=mask)


def swiglu_fwd(gate_up: Tensor) -> Tensor:
    """Launches the forward: (T, 2F) -> (T, F)."""
    gate_up = rows_of(gate_up)
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(T, F)
    arguments = {"x_ptr": gate_up, "y_ptr": y, "stride_xt": gate_up.stride(0), "F": F, "BLOCK_F": BLOCK_F}
    launch(swiglu_fwd_kernel, (T, triton.cdiv(F, BLOCK_F)), arguments)
    return y


def swiglu_bwd(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Launches the backward: the gradient of gate_up, (T, 2F), from that of y, (T, F)."""
    gate_up, grad = rows_of(gate_up), rows_of(grad)
    T, F = grad.shape
    dx = gate_up.new_empty(T, 2 * F)
    arguments = {"x_ptr": gate_up, "dy_ptr": grad, "dx_ptr": dx, "stride_xt": gate_up.stride(0)}
    arguments |= {"stride_dyt": grad.stride(0), "F": F, "BLOCK_F": BLOCK_F}
    launch(swiglu_bwd_kernel, (T, triton.cdiv(F, BLOCK_F)), arguments)
    return dx


_forward = torch.library.custom_op("ochat_kernels::swiglu", swiglu_fwd, mutates_args=())
_backward = torch.library.custom_op("ochat_kernels::swiglu_bwd", swiglu_bwd, mutates_args=())


@_forward.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_backward.register_fake
def _(gate_up, grad):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return _backward(*ctx.saved_tensors, grad)


_forward.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` with the gate in the first half of the columns.

    Args: gate_up (T, 2F) fp32, bf16 or fp16, rows of any stride. Returns: (T, F) of its dtype.
    Raises: ValueError for another dtype, shape or device.
    Costs: 5 T F FLOPs; forward moves 3 T F elements, backward 5 T F; saves its input alone; no sync.
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    check_floats("gate_up", gate_up, dims=2)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns: expected an even number, gate and up side by side")
    return _forward(gate_up)
