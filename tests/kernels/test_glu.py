"""The kernels of SwiGLU and GeGLU against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import glu, reference

from tests.kernels.harness import assert_op, random, strided_rows

NAMES = ["swiglu", "geglu"]


def both(name):
    """The kernel's function and the definition."""
    return getattr(glu, name), getattr(reference, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "lay_out"),
    [
        *(((rows, columns), torch.clone) for rows, columns in [(1, 2), (3, 10), (5, 2 * 1024), (2, 2 * 1031)]),
        ((12, 4), strided_rows),
        ((4, 12), torch.t),
    ],
)
def test_outputs_and_gradients(shape, lay_out, dtype, name):
    assert_op(*both(name), [lay_out(random(*shape, dtype=dtype, scale=3.0))])


@given(
    T=st.integers(0, 4),
    F=st.integers(0, 40),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
    name=st.sampled_from(NAMES),
)
@settings(max_examples=30, deadline=None)
def test_any_shape(T, F, scale, seed, name):
    assert_op(*both(name), [random(T, 2 * F, seed=seed, scale=scale)])


@pytest.mark.parametrize("name", NAMES)
def test_an_expanded_gradient(name):
    x = random(12, 4).requires_grad_()
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x) for f in both(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_gate_far_from_zero_is_open_or_shut(name):
    """Where the exponential of a gate, or the cube of one, is near the end of fp32 or beyond it."""
    gate = torch.tensor([[-1e4, -100.0, -20.0, 20.0, 100.0, 1e4]])
    x = torch.cat((gate, torch.full_like(gate, 2.0)), 1).to(random(1).device).requires_grad_()
    y = both(name)[0](x)
    is_open = gate[0].clamp(0, 1)
    torch.testing.assert_close(y.detach().cpu()[0], 2 * gate[0] * is_open, atol=1e-6, rtol=1e-6)
    gradient = torch.autograd.grad(y.sum(), x)[0].cpu()[0]
    torch.testing.assert_close(gradient, torch.cat((2 * is_open, gate[0] * is_open)), atol=1e-6, rtol=1e-6)
