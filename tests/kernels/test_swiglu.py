"""SwiGLU kernels against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import reference, swiglu

from tests.kernels.harness import assert_op, random, strided_rows

CPU_OR_CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (5, 2 * 1024), (2, 2 * 1031)])
def test_outputs_and_gradients(shape, dtype, device):
    assert_op(swiglu.swiglu, reference.swiglu, [random(*shape, dtype=dtype, device=device, scale=3.0)])


@given(T=st.integers(0, 4), F=st.integers(0, 40), scale=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_shape(T, F, scale, seed):
    x = random(T, 2 * F, dtype=torch.float32, device=CPU_OR_CUDA, seed=seed, scale=scale)
    assert_op(swiglu.swiglu, reference.swiglu, [x])


def test_any_strides(device):
    """Rows apart, a transposed input, and an expanded gradient."""
    x = random(12, 4, dtype=torch.float32, device=device)
    for leaf in (strided_rows(x), x.T):
        leaf = leaf.detach().requires_grad_()
        got, expected = (torch.autograd.grad(f(leaf).sum(), leaf) for f in (swiglu.swiglu, reference.swiglu))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), "float64: expected float32"),
        (torch.zeros(2, 2, 2), "expected 2 dimensions"),
        (torch.zeros(2, 5), "5 columns: expected an even number"),
        (torch.zeros(2, 4, device="meta"), "on meta"),
    ],
)
def test_refuses(x, message):
    x = x.to(CPU_OR_CUDA) if x.device.type == "cpu" else x
    with pytest.raises(ValueError, match=message):
        swiglu.swiglu(x)
