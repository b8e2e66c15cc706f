"""How kernels round fp32 to the dtype that they store: to nearest even, as the GPU's own conversion does."""

from __future__ import annotations

import triton
import triton.language as tl

from ochat_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`. Triton's interpreter cuts bf16 off, makes 1.2e-38 of a bf16 0, and loses the carry of an
    e4m3 that is rounded up to a power of 2: it gets the bits of the one, and the other rounded."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)  # a NaN stays one
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if _INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000  # 3 bits after the first
        even = (tl.abs(x) * 512.0 + 8388608.0 - 8388608.0) / 512.0  # below 2^-6 multiples of 2^-9
        signed = even.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
        nearest = tl.where(tl.abs(x) < 0.015625, signed, nearest).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)
