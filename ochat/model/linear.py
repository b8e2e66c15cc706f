"""How modules read their parameters, and how gradients are added up: no cast, copy or add of a whole weight.

    keep_copies(model.parameters(), torch.bfloat16)      # one process: once, before training
    y = linear(x, weight, bias);  x = look_up(input_ids, weight, torch.bfloat16);  w = cast(norm_weight, x.dtype)
    fill_copies(model.parameters())                      # after the parameters changed

A parameter may be wider than the computation (fp32 masters, bf16 products). On one process it has a copy in the
computation's dtype, which the optimizer writes; under FSDP the gathered parameter is that copy; without one, each use
casts. A weight's gradient has its `grad_dtype`. The first product of a step makes it, later ones add to it in the
same product: dW = dy^T x summed in fp32, whatever the number of micro-batches. Letters: T tokens, V rows of a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from ochat_kernels.products import add_product
from torch import Tensor

_COPY = "ochat_copy"  # the attribute of a parameter that holds its copy


def keep_copies(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Gives each parameter of another dtype a copy in `dtype`, without values yet. Costs: 2 bytes a number in bf16."""
    for parameter in parameters:
        if parameter.dtype != dtype:
            setattr(parameter, _COPY, torch.empty_like(parameter, dtype=dtype, requires_grad=False))


@torch.no_grad()
def fill_copies(parameters: Iterable[Tensor]) -> None:
    """Rounds the parameters into their copies."""
    for parameter in parameters:
        copy = copy_of(parameter)
        if copy is not None:
            copy.copy_(parameter)


def copy_of(parameter: Tensor) -> Tensor | None:
    """The parameter's copy in the dtype of the computation, or None."""
    return getattr(parameter, _COPY, None)


def read(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter's values in `dtype`, outside autograd's graph; a cast only where it has no copy."""
    copy = copy_of(parameter)
    values = parameter if copy is None else copy
    return values.detach().to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x (T, in), weight (out, in) and bias (out,) of x's dtype or wider: (T, out).

    Backward: 4 T in out FLOPs, one product of which adds to weight.grad.
    """
    if not _has_sum(weight):
        return F.linear(x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype))
    return _Linear.apply(x, weight, bias)  # type: ignore[return-value]


def look_up(input_ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table: input_ids (T,), weight (V, H) -> (T, H) in `dtype`. Backward adds T rows to weight.grad."""
    if not _has_sum(weight):
        return F.embedding(input_ids, weight).to(dtype)
    return _LookUp.apply(input_ids, weight, dtype)  # type: ignore[return-value]


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A small parameter (a norm's, a bias) in `dtype`, in autograd's graph."""
    copy = copy_of(parameter)
    if copy is None or copy.dtype != dtype or torch.compiler.is_compiling():
        return parameter.to(dtype)
    return _Cast.apply(parameter, copy)  # type: ignore[return-value]


def start_gradient(weight: Tensor) -> tuple[Tensor, bool]:
    """(weight.grad, whether it holds a sum already), to be written outside backward; a new one has no values yet."""
    if weight.grad is not None:
        return weight.grad, True
    weight.grad = torch.empty_like(weight, dtype=weight.grad_dtype, requires_grad=False)
    return weight.grad, False


def finish_gradient(weight: Tensor) -> None:
    """Tells whoever waits for a gradient that start_gradient gave (an optimizer that updates in backward) that it is
    complete."""
    for hook in (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(weight)


def weight_gradient(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor | None:
    """dy^T x (out, in) for a backward to return: it becomes weight.grad as it is, or was added to it."""
    if weight.grad is None:
        total = torch.empty_like(weight, dtype=weight.grad_dtype, requires_grad=False)
        return add_product(total, dy.t(), x, accumulate=False)
    add_product(weight.grad, dy.t(), x, accumulate=True)
    return None  # autograd tells hooks of the gradient all the same


def bias_gradient(dy: Tensor) -> Tensor:
    """The sum of dy (T, out) over tokens, in fp32 at least."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def _has_sum(weight: Tensor) -> bool:
    """Whether its gradient is added up here: not of a frozen weight, nor of one that was computed, nor by a compiler,
    which follows no gradient that is added in place."""
    return weight.requires_grad and weight.is_leaf and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, values = weight, read(weight, x.dtype)
        ctx.save_for_backward(x, values)  # where blocks are recomputed, a cast is made again and not kept
        return F.linear(x, values, None if bias is None else read(bias, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, values = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = dy @ values if needs_x else None
        return dx, weight_gradient(ctx.weight, dy, x), bias_gradient(dy) if needs_bias else None


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(input_ids)
        return F.embedding(input_ids, weight.detach()).to(dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        if ctx.weight.grad is None:
            total = torch.zeros_like(ctx.weight, dtype=ctx.weight.grad_dtype, requires_grad=False)
            return None, _add_rows(total, ids, dy), None
        _add_rows(ctx.weight.grad, ids, dy)
        return None, None, None


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.grad_dtype
        return copy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


def _add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """total (V, H) with rows (T, H) added at ids (T,), in a fixed order: on CUDA by sorting, on a CPU one by one."""
    rows = rows.to(total.dtype)
    return total.index_put_((ids,), rows, accumulate=True) if total.is_cuda else total.index_add_(0, ids, rows)
