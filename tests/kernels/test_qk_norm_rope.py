"""The kernels that normalise the heads of q and k and turn them, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import launch, qk_norm_rope, reference, rms_norm, rope
from torch import Tensor

from tests.kernels.harness import ATOL, DEVICE, assert_op, random
from tests.kernels.test_rope import DTYPES, angles, views
from tests.numerics import assert_close

EPS = 1e-5


def weights(D: int, dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """Of q and of k: about 1 with the offset added."""
    return [1 - offset + random(D, dtype=dtype, seed=seed, scale=0.3) for seed in (8, 9)]


def functions(d: int, T: int, offset: float = 0.0):
    """The kernel's function and the definition, of (q, k, q_weight, k_weight)."""
    cos, sin = angles(T, d)
    return [
        lambda q, k, q_weight, k_weight, m=m: m.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, EPS, offset)
        for m in (qk_norm_rope, reference)
    ]


@pytest.fixture
def few_programs(monkeypatch):
    """A card so small that a program of the backward walks several tiles, even of a test's few tokens."""
    monkeypatch.setattr(qk_norm_rope, "num_processors", lambda device: 1)
    monkeypatch.setattr(qk_norm_rope, "PROGRAMS", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("T", "N", "K", "D", "d"),
    [
        *((T, N, K, D, D) for T, N, K, D in [(5, 9, 3, 64), (1, 1, 1, 2), (3, 32, 8, 128), (2, 20, 10, 6)]),
        *((T, N, K, D, D) for T, N, K, D in [(3, 4, 1, 256), (1, 3, 5, 96), (1, 2, 1, 2050), (0, 2, 1, 8)]),
        *[(3, 24, 8, 128, 96), (5, 3, 1, 64, 16), (2, 2, 2, 7, 2), (40, 1, 1, 130, 2)],  # a part of each head
    ],
)
def test_outputs_and_gradients(T, N, K, D, d, dtype):
    for offset in (0.0, 1.0):
        assert_op(*functions(d, T, offset), [*views(T, N, K, D, dtype), *weights(D, dtype, offset)])


@pytest.mark.parametrize(("T", "N", "K", "D", "d"), [(37, 9, 3, 64, 64), (50, 5, 2, 14, 8), (300, 2, 1, 8, 8)])
def test_programs_that_walk_several_tiles(T, N, K, D, d, few_programs):
    for dtype in (torch.float32, torch.bfloat16):
        assert_op(*functions(d, T), [*views(T, N, K, D, dtype), *weights(D, dtype)])


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
    q, k = random(T, N + 2 * K, D, dtype=dtype, scale=scale).split((N, K, K), dim=1)[:2]
    assert_op(*functions(2 * half, T), [q, k, *weights(D, dtype)])


def test_any_strides():
    q, k = (
        random(3, 5, 8).transpose(0, 1),
        random(5, 8, 2).transpose(1, 2),
    )  # heads first; no dense dimension at the end
    q_weight, k_weight = random(8, 2, seed=3).unbind(1)
    assert_op(*functions(8, 5), [q, k, q_weight, k_weight])
    kernel, definition = functions(8, 5)
    leaves = [x.clone().requires_grad_() for x in (q, k, q_weight, k_weight)]
    upstream = [random(5, 1, 1, seed=1).expand(5, 3, 8), random(8, 2, 5, seed=2).permute(2, 1, 0)]
    found = [torch.autograd.grad(f(*leaves), leaves, upstream) for f in (kernel, definition)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_nearer_the_truth_than_norm_and_rope_apart(dtype):
    (q, k), (cos, sin) = views(20, 6, 2, 64, dtype), angles(20, 64)
    q_weight, k_weight = weights(64, dtype)
    wide = [x.double() for x in (q, k, q_weight, k_weight)]
    truth = reference.qk_norm_rope(*wide, cos, sin, EPS)
    apart = rope.rope(rms_norm.rms_norm(q, q_weight, EPS), rms_norm.rms_norm(k, k_weight, EPS), cos, sin)
    for fused, separate, true in zip(functions(64, 20)[0](q, k, q_weight, k_weight), apart, truth, strict=True):
        assert (fused - true).abs().mean() < 0.8 * (separate - true).abs().mean()  # rounded once and not twice


def test_fp32_weights_of_narrow_heads():
    q, k = views(4, 3, 2, 10, torch.bfloat16)
    upstream = [random(*x.shape, dtype=torch.bfloat16, seed=1) for x in (q, k)]
    results = []
    kernel, definition = functions(10, 4)
    for function, wide in ((kernel, None), (definition, None), (definition, torch.float64)):
        leaves = [x.to(wide or x.dtype).requires_grad_() for x in (q, k, *weights(10, torch.float32))]
        y = function(*leaves)
        results.append([*y, *torch.autograd.grad(y, leaves, [x.to(y[0].dtype) for x in upstream])])
    for got, expected, truth in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, truth, ATOL[got.dtype] * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize("wanted", [(True, True, False, False), (False, False, True, True), (False, True, True, False)])
def test_some_gradients_alone(wanted):
    assert_op(*functions(8, 3), [*views(3, 2, 1, 8, torch.float32), *weights(8, torch.float32)], list(wanted))


def test_frozen_weights_cost_no_sums_and_one_output_alone_has_a_gradient(monkeypatch):
    leaves = [*(x.clone().requires_grad_() for x in views(3, 2, 1, 8, torch.float32)), *weights(8, torch.float32)]
    kernel, definition = functions(8, 3)
    found = [torch.autograd.grad(f(*leaves)[0].sum(), leaves[0]) for f in (kernel, definition)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    y = kernel(*leaves)
    sums = []
    monkeypatch.setattr(
        qk_norm_rope, "launch", lambda kernel, grid, arguments, **_: sums.append(arguments["partial_ptr"])
    )
    sum(x.sum() for x in y).backward()
    assert sums == [None]


def test_heads_of_zeros():
    q = torch.zeros(2, 3, 8, device=DEVICE).requires_grad_()
    y = functions(8, 2)[0](q, q, *weights(8, torch.float32))[0]
    assert not y.any() and torch.autograd.grad(y.sum(), q)[0].isfinite().all()


def test_what_it_keeps_for_backward():
    """Its inputs, of which q and k are views of one product, and one number for each head; no result."""
    qkv, kept = random(5, 7, 8).requires_grad_(), {}
    q, k, _ = qkv.split((3, 2, 2), dim=1)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) and x, lambda x: x
    ):
        y = functions(8, 5)[0](q, k, *weights(8, torch.float32))
    kept.pop(qkv.data_ptr())
    assert not {x.data_ptr() for x in y} & set(kept)
    assert sorted(kept.values()) == [32, 32, 4 * 5 * 4, 4 * 5 * 4, 4 * 5 * 5]  # weights, angles, rstd


def test_the_number_of_programs():
    """Never more than there are tiles, else a multiple of the card's processors; none without tokens."""
    for T in (0, 3, 10**6):
        q, k = torch.empty(T, 48, 128, dtype=torch.bfloat16, device="meta").split((40, 8), dim=1)
        cos, weight, rstd = (q.new_empty(*shape, dtype=torch.float32) for shape in ((T, 64), (128,), (T, 48)))
        with launch.record() as launches:
            *_, dq_weight, dk_weight = qk_norm_rope.qk_norm_rope_bwd(
                q, k, q, k, weight, weight, cos, cos, rstd, 0.0, True
            )
        assert dq_weight.shape == dk_weight.shape == (128,)
        assert len(launches) == (1 if T else 0)
        for noted in launches:
            programs, tiles = noted.arguments["partial_ptr"].shape[0], -(-T // noted.arguments["BLOCK_T"])
            assert programs == tiles or (programs < tiles and programs % launch.UNKNOWN_CARD_PROCESSORS == 0)
