"""SwiGLU kernels against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import reference, swiglu

from tests.kernels.harness import assert_op, random, strided_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "lay_out"),
    [
        *(((rows, columns), torch.clone) for rows, columns in [(1, 2), (3, 10), (5, 2 * 1024), (2, 2 * 1031)]),
        ((12, 4), strided_rows),
        ((4, 12), torch.t),
    ],
)
def test_outputs_and_gradients(shape, lay_out, dtype):
    assert_op(swiglu.swiglu, reference.swiglu, [lay_out(random(*shape, dtype=dtype, scale=3.0))])


@given(T=st.integers(0, 4), F=st.integers(0, 40), scale=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_shape(T, F, scale, seed):
    assert_op(swiglu.swiglu, reference.swiglu, [random(T, 2 * F, seed=seed, scale=scale)])


def test_an_expanded_gradient():
    x = random(12, 4).requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x) for f in (swiglu.swiglu, reference.swiglu)))
