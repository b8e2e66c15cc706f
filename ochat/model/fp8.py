"""Linears whose products are of e4m3 rows: forward, and the gradient of the input; that of the weight stays as it is.

    model.use_fp8()                            # the linears of its blocks
    y = linear(x, weight, bias, ops)           # x (T, in), or Fp8Rows of it
    check(model_config)                        # ConfigError for sizes that a card's products cannot take

A norm before a branch and an activation quantise their result in the same pass and hand Fp8Rows to the linear that
reads it; other inputs are quantised where they are read. So is a weight, in every product: no copy takes memory or is
stale.
Formulas and errors: kernels/README.md.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from ochat_kernels.reference_fp8 import MULTIPLE
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model.config import ModelConfig
from ochat.model.linear import bias_gradient, read, weight_gradient


class Fp8Rows(NamedTuple):
    """What a linear reads, (T, in), with its rows in e4m3 and their scales (T, 1)."""

    values: Tensor
    rows8: Tensor
    scale: Tensor


def check(config: ModelConfig) -> None:
    """Raises: ConfigError that names a linear with a size that is no multiple of 16."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes = {"attn.qkv": (q + 2 * kv, hidden), "attn.out": (hidden, q)}
    sizes |= {"mlp.gate_up": (2 * inner, hidden), "mlp.down": (hidden, inner)}
    for name, (size_out, size_in) in sizes.items():
        if size_out % MULTIPLE or size_in % MULTIPLE:
            raise ConfigError(
                f"train.linear = 'fp8': {name} of a block has {size_in:,} inputs and {size_out:,} outputs; products of "
                f"fp8 need multiples of {MULTIPLE}: use 'bf16'"
            )


def linear(x: Tensor | Fp8Rows, weight: Tensor, bias: Tensor | None, ops: ModuleType) -> Tensor:
    """x @ weight.T + bias in bf16 for x (T, in) bf16, weight (out, in) and bias (out,) bf16 or wider: (T, out).

    Costs: as linear.linear, 2/3 of the FLOPs at the rate of e4m3; dy (T, out) and, unless they come with it, the rows
    of x are read once more, and the weight once forward and once backward. Keeps x and 4 bytes a row of the weight.
    """
    rows = x if isinstance(x, Fp8Rows) else Fp8Rows(x, *ops.quantize_rows(x.detach()))
    return _Linear.apply(rows.values, weight, bias, rows.rows8, rows.scale, ops)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x8: Tensor, x_scale: Tensor, ops: ModuleType
    ) -> Tensor:
        ctx.weight, ctx.ops = weight, ops
        w8, w_scale = ops.quantize_rows(weight.detach())
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w_scale)
        return ops.scaled_product(x8, x_scale, w8, w_scale, None if bias is None else read(bias, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w_scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = _input_gradient(dy, ctx.weight.detach(), w_scale, ctx.ops) if needs_x else None
        dweight = weight_gradient(ctx.weight, dy, x) if needs_weight else None
        return dx, dweight, bias_gradient(dy) if needs_bias else None, None, None, None


def _input_gradient(dy: Tensor, weight: Tensor, w_scale: Tensor, ops: ModuleType) -> Tensor:
    """dy @ weight, by way of e4m3 tensors that are gone when the gradient of the weight is made."""
    return ops.scaled_product(*ops.quantize_rows(dy, w_scale), ops.quantize_transposed(weight, w_scale))
