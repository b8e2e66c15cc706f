"""Products of e4m3 numbers with a scale for each row, in plain PyTorch: the definition, and what a CPU trains with.

    x8, x_scale = quantize_rows(x);  w8, w_scale = quantize_rows(weight)      # (T, in), (out, in)
    y = scaled_product(x8, x_scale, w8, w_scale)                              # x @ weight.T
    dy8, dy_scale = quantize_rows(dy, w_scale)                                # dy times the scales of weight's rows
    dx = scaled_product(dy8, dy_scale, quantize_transposed(weight, w_scale))  # dy @ weight, of the same w8

A row x is stored as x8 = e4m3(x / scale), scale = max |x| / 448. The gradient's product sums over the rows of the
weight, so their scales go into dy before it is quantised: forward and backward multiply by one w8, and a weight has one
scale a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of both sizes of a weight: what a card's products take
SMALLEST = 2.0**-100  # a row's largest element counts as no less: 1 / scale is finite, and a row of zeros stays zeros


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x8 (T, H) e4m3, scale (T, 1) fp32) of x (T, H), times `factors` (H, 1) where given, the scales of a weight's
    rows. With a NaN or an infinity its row of a product is not
    finite."""
    wide = x.float() if factors is None else x.float() * factors.t()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(SMALLEST) * (1 / LARGEST)
    return (wide * (1 / scale)).to(FP8), scale


def quantize_transposed(weight: Tensor, scale: Tensor) -> Tensor:
    """quantize_rows(weight)[0] transposed, (in, out) e4m3, from the scales (out, 1) that it gave."""
    return (weight.float() * (1 / scale)).to(FP8).t().contiguous()


def scaled_product(
    a8: Tensor, a_scale: Tensor, b8: Tensor, b_scale: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """(a_scale a8) (b_scale b8)^T + bias in bf16: a8 (T, n) with scales (T, 1), b8 (m, n) with scales (m, 1), 1 where
    there are none, bias (m,) bf16. Sums in fp32, rounded once."""
    y = (a8.float() @ b8.float().t()) * a_scale
    y = y if b_scale is None else y * b_scale.t()
    return (y if bias is None else y + bias.float()).bfloat16()
