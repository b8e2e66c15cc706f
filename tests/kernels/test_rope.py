"""The rotary kernel against the definition, and against what a rotation is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import reference, rope
from ochat_kernels.launch import record
from torch import Tensor

from tests.kernels.harness import assert_op, random

CPU_OR_CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(T: int, D: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (T, D/2) of angles of every quadrant."""
    turns = random(T, D // 2, dtype=torch.float32, device=device, seed=7, scale=4.0)
    return turns.cos(), turns.sin()


def packed(T: int, N: int, K: int, D: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """A product of q, k and v, (T, N + 2K, D)."""
    return random(T, N + 2 * K, D, dtype=dtype, device=device, seed=seed)


def assert_rope(q: Tensor, k: Tensor) -> None:
    cos, sin = angles(q.shape[0], q.shape[2], q.device)
    assert_op(lambda q, k: rope.rope(q, k, cos, sin), lambda q, k: reference.rope(q, k, cos, sin), [q, k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D"),
    [(5, 9, 3, 64), (1, 1, 1, 2), (3, 32, 8, 128), (2, 20, 10, 6), (300, 2, 1, 8), (1, 3, 5, 96), (1, 2, 1, 2050)],
)
def test_outputs_and_gradients(T, N, K, D, dtype, device):
    q, k, _ = packed(T, N, K, D, dtype, device).split((N, K, K), dim=1)
    assert_rope(q, k)


@given(
    T=st.integers(0, 6),
    N=st.integers(0, 9),
    K=st.integers(0, 4),
    half=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(T, N, K, half, dtype, seed):
    q, k, _ = packed(T, N, K, 2 * half, dtype, CPU_OR_CUDA, seed).split((N, K, K), dim=1)
    assert_rope(q, k)


def test_any_strides(device):
    q = random(3, 5, 8, dtype=torch.float32, device=device).transpose(0, 1)  # heads first in memory
    k = random(5, 8, 2, dtype=torch.float32, device=device).transpose(1, 2)  # no dense dimension at the end
    assert_rope(q, k)
    columns = torch.stack(angles(5, 8, device), dim=-1)  # cos and sin interleaved: neither is contiguous
    cos, sin = columns.unbind(-1)
    torch.testing.assert_close(rope.rope(q, k, cos, sin), reference.rope(q, k, cos, sin))


def test_expanded_gradients_and_one_that_is_missing(device):
    cos, sin = angles(3, 8, device)
    q = random(3, 4, 8, dtype=torch.float32, device=device).requires_grad_()
    k = random(3, 2, 8, dtype=torch.float32, device=device).requires_grad_()
    got = torch.autograd.grad(rope.rope(q, k, cos, sin)[0].sum(), (q, k), allow_unused=True)
    expected = torch.autograd.grad(reference.rope(q, k, cos, sin)[0].sum(), q)
    torch.testing.assert_close(got[0], expected[0])
    assert got[1] is None or not got[1].any()


@pytest.mark.parametrize(("shape", "far"), [((3, 2, 32), 0), ((2, 3, 32), 1)])
def test_an_offset_beyond_32_bits(shape, far):
    distance = 2**30 + 32  # of two tokens or of two heads: each stride fits 32 bits, two of them don't
    torch.use_deterministic_algorithms(False)  # only the pages of a few rows are ever touched
    strides = (distance, 32, 1) if far == 0 else (32, distance, 1)
    x = torch.empty(2 * distance + 64, dtype=torch.bfloat16, device=CPU_OR_CUDA).as_strided(shape, strides)
    x.copy_(random(*shape, dtype=torch.bfloat16, device=CPU_OR_CUDA))
    cos, sin = angles(shape[0], 32, CPU_OR_CUDA)
    torch.testing.assert_close(rope.rope(x, x, cos, sin), reference.rope(x, x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_position_zero_is_the_identity(dtype, device):
    q, k, _ = packed(3, 3, 2, 10, dtype, device).split((3, 2, 2), dim=1)
    zero = torch.zeros(3, 5, device=device)
    turned_q, turned_k = rope.rope(q, k, zero.cos(), zero.sin())
    assert torch.equal(turned_q, q) and torch.equal(turned_k, k)


def test_launchers_take_meta_tensors():
    q, k, _ = torch.empty(10, 16, 64, device="meta").split((8, 4, 4), dim=1)
    cos = torch.empty(10, 32, device="meta")
    with record() as launches:
        rope.rope_fwd(q, k, cos, cos)
        rope.rope_bwd(q, k, cos, cos)
    assert len(launches) == 2  # one for q and k together


GOOD = (torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("place", "x", "message"),
    [
        (0, torch.zeros(3, 4, 8, dtype=torch.float64), "q is torch.float64: expected float32"),
        (1, torch.zeros(3, 16), "k has shape .* expected 3 dimensions"),
        (0, torch.zeros(3, 4, 8, device="meta"), "q is on meta"),
        (0, torch.zeros(3, 4, 7), "q has heads of 7 elements: expected an even number"),
        (0, torch.zeros(3, 4, 0), "q has heads of 0 elements"),
        (1, torch.zeros(2, 2, 8), r"k is torch.float32 \(2, 2, 8\).*expected torch.float32 \(3, 2, 8\)"),
        (1, torch.zeros(3, 2, 6), r"k is torch.float32 \(3, 2, 6\)"),
        (1, torch.zeros(3, 2, 8, dtype=torch.bfloat16), "k is torch.bfloat16 .*expected torch.float32"),
        (2, torch.zeros(3, 8), r"cos is torch.float32 \(3, 8\).*expected torch.float32 \(3, 4\)"),
        (3, torch.zeros(1, 4), r"sin is torch.float32 \(1, 4\)"),
        (3, torch.zeros(3, 4, dtype=torch.bfloat16), "sin is torch.bfloat16"),
        (2, torch.zeros(3, 4, requires_grad=True), r"cos requires a gradient.*pass cos.detach\(\)"),
        (3, torch.zeros(3, 4, requires_grad=True), "sin requires a gradient"),
    ],
)
def test_refuses(place, x, message):
    arguments = [x if i == place else good for i, good in enumerate(GOOD)]
    arguments = [x.to(CPU_OR_CUDA) if x.device.type == "cpu" else x for x in arguments]
    with pytest.raises(ValueError, match=message):
        rope.rope(*arguments)
