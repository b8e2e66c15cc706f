"""The kernels that normalise the heads of q and k and turn them, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import launch, qkv_norm_rope, reference, rms_norm, rope
from torch import Tensor

from tests.kernels.harness import ATOL, DEVICE, assert_op, outputs_and_gradients, random, strided_rows
from tests.kernels.test_rope import DTYPES, angles, product
from tests.numerics import assert_close

EPS = 1e-5


def weights(D: int, dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """Of q and of k: about 1 with the offset added."""
    return [1 - offset + random(D, dtype=dtype, seed=seed, scale=0.3) for seed in (8, 9)]


def functions(N: int, K: int, d: int, T: int, offset: float = 0.0):
    """The kernel's function and the definition, of (qkv, q_weight, k_weight)."""
    cos, sin = angles(T, d)
    return [
        lambda qkv, *weights, m=m: m.qkv_norm_rope(qkv, *weights, cos, sin, N, K, EPS, offset)
        for m in (qkv_norm_rope, reference)
    ]


@pytest.fixture
def few_programs(monkeypatch):
    """A card so small that a program of the backward walks several tiles, even of a test's few tokens."""
    monkeypatch.setattr(qkv_norm_rope, "num_processors", lambda device: 1)
    monkeypatch.setattr(qkv_norm_rope, "PROGRAMS", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D", "d"),
    [
        *((T, N, K, D, D) for T, N, K, D in [(5, 9, 3, 64), (1, 1, 1, 2), (3, 32, 8, 128), (2, 20, 10, 6)]),
        *((T, N, K, D, D) for T, N, K, D in [(3, 4, 1, 256), (1, 3, 5, 96), (1, 2, 1, 2050), (0, 2, 1, 8)]),
        *[(3, 24, 8, 128, 96), (5, 3, 1, 64, 16), (2, 2, 2, 7, 2), (5, 1, 1, 130, 2)],  # a part of each head
    ],
)
def test_outputs_and_gradients(T, N, K, D, d, dtype):
    for offset in (0.0, 1.0):
        assert_op(*functions(N, K, d, T, offset), [product(T, N, K, D, dtype), *weights(D, dtype, offset)])


@pytest.mark.parametrize(("T", "N", "K", "D", "d"), [(37, 9, 3, 64, 64), (50, 5, 2, 14, 8), (300, 2, 1, 8, 8)])
def test_programs_that_walk_several_tiles(T, N, K, D, d, few_programs):
    for dtype in (torch.float32, torch.bfloat16):
        assert_op(*functions(N, K, d, T), [product(T, N, K, D, dtype), *weights(D, dtype)])


@given(
    T=st.integers(0, 6),
    N=st.integers(1, 9),
    K=st.integers(1, 4),
    half=st.integers(1, 12),
    rest=st.sampled_from([0, 0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(T, N, K, half, rest, dtype, scale):
    D = 2 * half + rest
    qkv = random(T, (N + 2 * K) * D, dtype=dtype, scale=scale)
    assert_op(*functions(N, K, 2 * half, T), [qkv, *weights(D, dtype)])


def test_any_strides():
    N, K, D = 3, 2, 8
    q_weight, k_weight = random(D, 2, seed=3).unbind(1)
    for qkv in (strided_rows(product(5, N, K, D, torch.float32)), random((N + 2 * K) * D, 5).T):
        assert_op(*functions(N, K, D, 5), [qkv, q_weight, k_weight])
        kernel, definition = functions(N, K, D, 5)
        leaves = [x.clone().requires_grad_() for x in (qkv, q_weight, k_weight)]
        upstream = [random(5, 1, 1, seed=1).expand(5, N, D), random(D, K, 5, seed=2).permute(2, 1, 0)]
        upstream.append(random(K, 5, D, seed=4).transpose(0, 1))
        found = [torch.autograd.grad(f(*leaves), leaves, upstream) for f in (kernel, definition)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
        assert found[0][0].is_contiguous() and torch.equal(found[0][0].unflatten(1, (-1, D))[:, -K:], upstream[2])


def test_v_is_copied_bit_for_bit():
    qkv = product(9, 3, 2, 64, torch.bfloat16)
    qkv[0, -1], qkv[1, -5] = float("nan"), float("inf")
    for function in functions(3, 2, 32, 9):
        v = function(qkv, *weights(64, torch.bfloat16))[2]
        assert v.is_contiguous() and torch.equal(
            v.view(torch.int16), qkv.unflatten(1, (-1, 64))[:, -2:].view(torch.int16)
        )


def test_two_runs_give_the_same_bits(few_programs):
    leaves = [product(37, 9, 3, 64, torch.bfloat16), *weights(64, torch.bfloat16)]
    runs = [outputs_and_gradients(functions(9, 3, 64, 37)[0], leaves, [True] * 3, torch.bfloat16) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_nearer_the_truth_than_norm_and_rope_apart(dtype):
    qkv, (cos, sin) = product(20, 6, 2, 64, dtype), angles(20, 64)
    q, k, _ = rope.heads_of(qkv, 6, 2)
    q_weight, k_weight = weights(64, dtype)
    wide = [x.double() for x in (qkv, q_weight, k_weight)]
    truth = reference.qkv_norm_rope(*wide, cos, sin, 6, 2, EPS)[:2]
    apart = rope.rope(rms_norm.rms_norm(q, q_weight, EPS), rms_norm.rms_norm(k, k_weight, EPS), cos, sin)
    together = functions(6, 2, 64, 20)[0](qkv, q_weight, k_weight)[:2]
    for fused, separate, true in zip(together, apart, truth, strict=True):
        assert (fused - true).abs().mean() < 0.8 * (separate - true).abs().mean()  # rounded once and not twice


def test_fp32_weights_of_narrow_heads():
    qkv = product(4, 3, 2, 10, torch.bfloat16)
    upstream = [random(4, count, 10, dtype=torch.bfloat16, seed=1) for count in (3, 2, 2)]
    results = []
    kernel, definition = functions(3, 2, 10, 4)
    for function, wide in ((kernel, None), (definition, None), (definition, torch.float64)):
        leaves = [x.to(wide or x.dtype).requires_grad_() for x in (qkv, *weights(10, torch.float32))]
        y = function(*leaves)
        results.append([*y, *torch.autograd.grad(y, leaves, [x.to(y[0].dtype) for x in upstream])])
    for got, expected, truth in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, truth, ATOL[got.dtype] * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, False, True)])
def test_some_gradients_alone(wanted):
    inputs = [product(3, 2, 1, 8, torch.float32), *weights(8, torch.float32)]
    without_v = [lambda *leaves, f=f: f(*leaves)[:2] for f in functions(2, 1, 8, 3)]  # it has no gradient of a weight
    assert_op(*without_v, inputs, list(wanted))


def test_frozen_weights_cost_no_sums_and_one_output_alone_has_a_gradient(monkeypatch):
    leaves = [product(3, 2, 1, 8, torch.float32).requires_grad_(), *weights(8, torch.float32)]
    kernel, definition = functions(2, 1, 8, 3)
    found = [torch.autograd.grad(f(*leaves)[0].sum(), leaves[0]) for f in (kernel, definition)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    y = kernel(*leaves)
    sums = []
    monkeypatch.setattr(
        qkv_norm_rope, "launch", lambda kernel, grid, arguments, **_: sums.append(arguments["partial_ptr"])
    )
    sum(x.sum() for x in y).backward()
    assert sums == [None]


def test_heads_of_zeros():
    qkv = torch.zeros(2, 5 * 8, device=DEVICE).requires_grad_()
    y = functions(3, 1, 8, 2)[0](qkv, *weights(8, torch.float32))[0]
    assert not y.any() and torch.autograd.grad(y.sum(), qkv)[0].isfinite().all()


def test_what_it_keeps_for_backward():
    """Its inputs and one number for each head; no result."""
    qkv, kept = product(5, 3, 2, 8, torch.float32).requires_grad_(), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
    ):
        y = functions(3, 2, 8, 5)[0](qkv, *weights(8, torch.float32))
    kept.pop(qkv.data_ptr())
    assert not {x.data_ptr() for x in y} & set(kept)
    assert sorted(kept.values()) == [32, 32, 4 * 5 * 4, 4 * 5 * 4, 4 * 5 * 5]  # weights, angles, rstd


def test_the_number_of_programs():
    """Never more than there are tiles, else a multiple of the card's processors; none without tokens."""
    for T in (0, 3, 10**6):
        qkv = torch.empty(T, 56 * 128, dtype=torch.bfloat16, device="meta")
        gradients = rope.new_heads(qkv, 40, 8)
        cos, weight, rstd = (qkv.new_empty(*shape, dtype=torch.float32) for shape in ((T, 64), (128,), (T, 48)))
        with launch.record() as launches:
            _, dq_weight, dk_weight = qkv_norm_rope.qkv_norm_rope_bwd(
                *gradients, qkv, weight, weight, cos, cos, rstd, 0.0, True
            )
        assert dq_weight.shape == dk_weight.shape == (128,)
        assert len(launches) == (1 if T else 0)
        for noted in launches:
            programs, tiles = noted.arguments["partial_ptr"].shape[0], -(-T // noted.arguments["BLOCK_T"])
            assert programs == tiles or (programs < tiles and programs % launch.UNKNOWN_CARD_PROCESSORS == 0)
