"""The rotary kernel against the definition, and against what a rotation is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import reference, rope
from ochat_kernels.launch import record
from torch import Tensor

from tests.kernels.harness import DEVICE, assert_op, random, strided_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(T: int, d: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, d/2) of angles of every quadrant."""
    turns = random(T, d // 2, seed=7, scale=4.0)
    return turns.cos(), turns.sin()


def views(T: int, N: int, K: int, D: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """q and k of a product of q, k and v, (T, N + 2K, D)."""
    return random(T, N + 2 * K, D, dtype=dtype, seed=seed).split((N, K, K), dim=1)[:2]


def product(T: int, N: int, K: int, D: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of q, k and v, (T, (N + 2K) D)."""
    return random(T, (N + 2 * K) * D, dtype=dtype, seed=seed)


def assert_qkv_rope(qkv: Tensor, N: int, K: int, d: int) -> None:
    """The rule of accuracy; and bit for bit what rope gives for the views, beside v, forward and backward."""
    cos, sin = angles(qkv.shape[0], d)
    kernel, definition = (lambda qkv, m=m: m.qkv_rope(qkv, cos, sin, N, K) for m in (rope, reference))
    assert_op(kernel, definition, [qkv])
    q, k, v = rope.heads_of(qkv, N, K)
    got = kernel(qkv)
    assert all(map(torch.equal, got, (*rope.rope(q, k, cos, sin), v)))
    assert all(
        y.is_contiguous() and y.data_ptr() != x.data_ptr() for x, y in zip((q, k, v), got, strict=True) if y.numel()
    )
    gradients = tuple(random(*y.shape, dtype=y.dtype, seed=i + 1) for i, y in enumerate(got))
    apart = torch.cat((*rope.rope_bwd(*gradients[:2], cos, sin), gradients[2]), dim=1)
    packed = rope.qkv_rope_bwd(*gradients, cos, sin)
    assert packed.is_contiguous() and torch.equal(packed, apart.flatten(1))


def assert_rope(q: Tensor, k: Tensor, d: int | None = None) -> None:
    cos, sin = angles(q.shape[0], q.shape[2] if d is None else d)
    assert_op(lambda q, k: rope.rope(q, k, cos, sin), lambda q, k: reference.rope(q, k, cos, sin), [q, k])
    back, opposite = rope.rope_bwd(q, k, cos, sin), rope.rope_fwd(q, k, cos, -sin)
    still = rope.rope(q, k, torch.ones_like(cos), torch.zeros_like(sin))  # as at position 0
    assert all(map(torch.equal, (*back, *still), (*opposite, q, k)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D"),
    [(5, 9, 3, 64), (1, 1, 1, 2), (3, 32, 8, 128), (2, 20, 10, 6), (300, 2, 1, 8), (1, 3, 5, 96), (1, 2, 1, 2050)],
)
def test_outputs_and_gradients(T, N, K, D, dtype):
    assert_rope(*views(T, N, K, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D", "d"),
    [(3, 24, 8, 128, 96), (5, 3, 1, 64, 16), (2, 2, 2, 7, 2), (5, 1, 1, 130, 2), (1, 2, 1, 2050, 1026)],
)
def test_a_part_of_each_head(T, N, K, D, d, dtype):
    q, k = views(T, N, K, D, dtype)
    assert_rope(q, k, d)
    turned = rope.rope(q, k, *angles(T, d))
    assert all(torch.equal(y[..., d:], x[..., d:]) for x, y in zip((q, k), turned, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D", "d"),
    [
        *((T, N, K, D, D) for T, N, K, D in [(5, 9, 3, 64), (1, 1, 1, 2), (3, 32, 8, 128), (2, 20, 10, 6)]),
        *((T, N, K, D, D) for T, N, K, D in [(300, 2, 1, 8), (1, 3, 5, 96), (1, 2, 1, 2050), (0, 2, 1, 8)]),
        *[(3, 24, 8, 128, 96), (5, 3, 1, 64, 16), (2, 2, 2, 7, 2), (5, 1, 1, 130, 2)],  # a part of each head
    ],
)
def test_a_product(T, N, K, D, d, dtype):
    assert_qkv_rope(product(T, N, K, D, dtype), N, K, d)


def test_products_of_any_strides_and_values():
    """Rows of a wider matrix, columns first, and what is neither finite nor 0 / 0."""
    qkv = product(5, 3, 2, 8, torch.bfloat16)
    for each in (strided_rows(qkv), qkv.T.contiguous().T, strided_rows(qkv, 8)):
        assert_qkv_rope(each, 3, 2, 8)
    cos, sin = angles(5, 8)
    qkv[0, -1], qkv[1, -2] = float("nan"), float("-inf")  # of v
    bits = qkv.unflatten(1, (-1, 8))[:, -2:].view(torch.int16)
    assert torch.equal(rope.qkv_rope(qkv, cos, sin, 3, 2)[2].view(torch.int16), bits)
    leaf = product(5, 3, 2, 8, torch.float32).requires_grad_()
    upstream = [random(5, 1, 1, seed=1).expand(5, 3, 8), random(8, 2, 5, seed=2).permute(2, 1, 0)]
    upstream.append(random(2, 5, 8, seed=4).transpose(0, 1))
    found = [torch.autograd.grad(m.qkv_rope(leaf, cos, sin, 3, 2), leaf, upstream) for m in (rope, reference)]
    torch.testing.assert_close(*found)
    alone = [torch.autograd.grad(m.qkv_rope(leaf, cos, sin, 3, 2)[1].sum(), leaf) for m in (rope, reference)]
    torch.testing.assert_close(*alone)  # q and v have no gradient


def test_what_a_product_leaves_for_backward():
    """cos and sin; the product and the results are not kept."""
    qkv, (cos, sin), kept = product(5, 3, 2, 8, torch.float32).requires_grad_(), angles(5, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        results = rope.qkv_rope(qkv * 1, cos, sin, 3, 2)
    assert kept == [cos.data_ptr(), sin.data_ptr()] and results[0].requires_grad


@given(
    T=st.integers(0, 6),
    N=st.integers(1, 9),
    K=st.integers(1, 4),
    half=st.integers(1, 12),
    rest=st.sampled_from([0, 0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_product_of_any_shape(T, N, K, half, rest, dtype, seed):
    assert_qkv_rope(product(T, N, K, 2 * half + rest, dtype, seed), N, K, 2 * half)


@given(
    T=st.integers(0, 6),
    N=st.integers(0, 9),
    K=st.integers(0, 4),
    half=st.integers(1, 12),
    rest=st.sampled_from([0, 0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(T, N, K, half, rest, dtype, seed):
    assert_rope(*views(T, N, K, 2 * half + rest, dtype, seed), 2 * half)


def test_any_strides():
    q = random(3, 5, 8).transpose(0, 1)  # heads first in memory
    k = random(5, 8, 2).transpose(1, 2)  # no dense dimension at the end
    assert_rope(q, k)
    columns = torch.stack(angles(5, 8), dim=-1)  # cos and sin interleaved: neither is contiguous
    cos, sin = columns.unbind(-1)
    torch.testing.assert_close(rope.rope(q, k, cos, sin), reference.rope(q, k, cos, sin))


def test_expanded_gradients_and_one_that_is_missing():
    cos, sin = angles(3, 8)
    q = random(3, 4, 8).requires_grad_()
    k = random(3, 2, 8).requires_grad_()
    got = torch.autograd.grad(rope.rope(q, k, cos, sin)[0].sum(), (q, k), allow_unused=True)
    expected = torch.autograd.grad(reference.rope(q, k, cos, sin)[0].sum(), q)
    torch.testing.assert_close(got[0], expected[0])
    assert got[1] is None or not got[1].any()


@pytest.mark.parametrize(("shape", "far"), [((3, 2, 32), 0), ((2, 3, 32), 1)])
def test_an_offset_beyond_32_bits(shape, far):
    distance = 2**30 + 32  # of two tokens or of two heads: each stride fits 32 bits, two of them don't
    torch.use_deterministic_algorithms(False)  # only the pages of a few rows are ever touched
    strides = (distance, 32, 1) if far == 0 else (32, distance, 1)
    x = torch.empty(2 * distance + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(shape, strides)
    x.copy_(random(*shape, dtype=torch.bfloat16))
    cos, sin = angles(shape[0], 32)
    torch.testing.assert_close(rope.rope(x, x, cos, sin), reference.rope(x, x, cos, sin))


def test_launchers_take_meta_tensors():
    q, k, _ = torch.empty(10, 16, 64, device="meta").split((8, 4, 4), dim=1)
    cos = torch.empty(10, 32, device="meta")
    with record() as launches:
        rope.rope_fwd(q, k, cos, cos)
        rope.rope_bwd(q, k, cos, cos)
        rope.qkv_rope_fwd(torch.empty(10, 16 * 64, device="meta"), cos, cos, 8, 4)
        rope.qkv_rope_bwd(q, k, k, cos, cos)
    assert len(launches) == 4  # one for q, k and v together
