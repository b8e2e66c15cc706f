"""How kernels round fp32 to the dtype that they store: to nearest even, as the GPU's own conversion does."""

from __future__ import annotations

import triton
import triton.language as tl

from ochat_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`. Triton's interpreter cuts bf16 off where a GPU rounds, so there it is rounded first."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)
