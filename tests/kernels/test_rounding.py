"""What kernels store is what PyTorch's own conversion gives, to the bit, for every kind of number."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels.launch import launch
from ochat_kernels.rounding import narrow
from torch import Tensor

from tests.kernels.harness import DEVICE

BLOCK = 64
HALF_AN_ULP = 2.0**-8  # of 1 in bf16
KINDS = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 2.0**-126, 2.0**-133, 2.0**-134, 3.4e38, -3.4e38]
TIES = [1 + HALF_AN_ULP, 1 + 3 * HALF_AN_ULP, -1 - HALF_AN_ULP, 2.0**-133 * 1.5, 2.0**-133 * 2.5]
BESIDE_TIES = [1 + HALF_AN_ULP + 2.0**-23, 1 + HALF_AN_ULP - 2.0**-23, 65519.0, 65520.0, 2.0**-25]


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, narrow(tl.load(x_ptr + i), y_ptr.dtype.element_ty))


def narrowed(values: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By the kernel and by PyTorch."""
    x = torch.zeros(BLOCK)
    x[: len(values)] = torch.tensor(values)
    x = x.to(DEVICE)
    y = torch.empty_like(x, dtype=dtype)
    launch(_narrow_kernel, (1,), {"x_ptr": x, "y_ptr": y, "BLOCK": BLOCK})
    return y, x.to(dtype)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """A NaN may have any bits."""
    assert torch.equal(got.isnan(), expected.isnan())
    kept = ~expected.isnan()
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got[kept].view(integers), expected[kept].view(integers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kind_of_number(dtype):
    assert_same_bits(*narrowed(KINDS + TIES + BESIDE_TIES, dtype))


@given(st.lists(st.floats(width=32), max_size=BLOCK), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(deadline=None)
def test_any_number(values, dtype):
    assert_same_bits(*narrowed(values, dtype))
