"""RMSNorm kernels, alone and after the residual addition, against the definition."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import launch, reference, rms_norm

from tests.kernels.harness import ATOL, DEVICE, assert_op, random, strided_rows
from tests.numerics import assert_close

EPS = 1e-5


norm, norm_definition = (partial(module.rms_norm, eps=EPS) for module in (rms_norm, reference))
add_norm, add_norm_definition = (partial(module.add_rms_norm, eps=EPS) for module in (rms_norm, reference))


def draw(*shape, dtype=torch.float32, scale=1.0):
    """x, a residual, and a weight about 1."""
    x = random(*shape, dtype=dtype, scale=scale)
    residual = random(*shape, dtype=dtype, seed=7, scale=3 * scale)
    return x, residual, 1 + random(shape[-1], dtype=dtype, seed=8, scale=0.3)


@pytest.fixture
def one_processor(monkeypatch):
    """A card so small that a program of the backward walks several tiles, even of a test's few rows."""
    monkeypatch.setattr(rms_norm, "num_processors", lambda device: 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "lay_out"),
    [
        *((shape, torch.clone) for shape in [(1, 1), (3, 7), (5, 64), (2, 1031), (2, 4096), (1, rms_norm.MAX_H)]),
        *((shape, torch.clone) for shape in [(12,), (2, 3, 12), (2, 0, 12), (0, 12)]),
        ((4, 10), strided_rows),
    ],
)
def test_outputs_and_gradients(shape, lay_out, dtype):
    x, residual, weight = draw(*shape, dtype=dtype)
    assert_op(norm, norm_definition, [lay_out(x), weight])
    assert_op(add_norm, add_norm_definition, [lay_out(x), lay_out(residual), weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (5, 130), (0, 12)])
def test_an_offset_of_the_weight(shape, dtype):
    x, residual, weight = draw(*shape, dtype=dtype)
    for small in (weight / 100, torch.zeros_like(weight)):  # Gemma's are stored less 1, some near 0
        assert_op(partial(norm, offset=1.0), partial(norm_definition, offset=1.0), [x, small])
        functions = partial(add_norm, offset=1.0), partial(add_norm_definition, offset=1.0)
        assert_op(*functions, [x, residual, small])


@pytest.mark.parametrize("shape", [(67, 130), (600, 8), (7, 4096), (6, 4097)])
def test_programs_that_walk_several_tiles(shape, one_processor):
    assert_op(add_norm, add_norm_definition, list(draw(*shape, dtype=torch.bfloat16)))
    assert_op(add_norm, add_norm_definition, list(draw(*shape)))


@given(
    T=st.integers(0, 40),
    H=st.integers(1, 300),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(T, H, scale, dtype):
    x, residual, weight = draw(T, H, dtype=dtype, scale=scale)
    assert_op(add_norm, add_norm_definition, [x, residual, weight])
    if scale == 1e-3:  # eps outweighs the mean square
        assert_op(norm, norm_definition, [x, weight])


@pytest.mark.parametrize("layout", ["rows apart", "heads of a fused product", "transposed"])
def test_inputs_and_gradients_of_any_stride(layout):
    """Each tensor in a matrix of its own width, or q and k in one that no single stride spans."""
    x, residual, weight = draw(4, 3, 10)
    weight = torch.stack((weight, torch.zeros_like(weight)), 1)[:, 0]
    lay_out = {
        "rows apart": strided_rows,
        "heads of a fused product": lambda x, padding: strided_rows(x.transpose(1, 2), padding).transpose(1, 2),
        "transposed": lambda x, padding: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }[layout]
    leaves = [t.requires_grad_() for t in (lay_out(x, padding=3), lay_out(residual, padding=5), weight)]
    upstream = [lay_out(random(4, 3, 10, seed=s), padding=s) for s in (3, 5)]
    for of_sum in (upstream[1], upstream[1][..., :1].expand(4, 3, 10)):
        results = [(f(*leaves), [upstream[0], of_sum]) for f in (add_norm, add_norm_definition)]
        torch.testing.assert_close(results[0][0], results[1][0])
        torch.testing.assert_close(*(torch.autograd.grad(outputs, leaves, given) for outputs, given in results))
    torch.testing.assert_close(norm(leaves[0], weight), norm_definition(leaves[0], weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_weight_of_narrow_rows(dtype):
    x, _, weight = draw(4, 96, dtype=dtype)
    upstream = random(4, 96, dtype=dtype, seed=1)
    results = []
    for function, wide in ((norm, None), (norm_definition, None), (norm_definition, torch.float64)):
        leaves = [x.to(wide or dtype).requires_grad_(), weight.to(wide or torch.float32).requires_grad_()]
        y = function(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))])
    for got, expected, truth in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        assert_close(got, expected, truth, ATOL[got.dtype] * max(1.0, truth.abs().max().item()))


def test_the_sum_is_rounded_before_it_is_normalised():
    x, residual, weight = draw(8, 64, dtype=torch.bfloat16)
    y, total = add_norm(x, residual, weight)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, norm(total, weight), rtol=0, atol=0)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_one_output_alone_has_a_gradient(used):
    leaves = [t.requires_grad_() for t in draw(5, 12)]
    got, expected = (
        torch.autograd.grad(
            sum((y * y).sum() for y, is_used in zip(function(*leaves), used, strict=True) if is_used),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for function in (add_norm, add_norm_definition)
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_gradients_of_x_and_residual_are_apart():
    x, residual, weight = (t.requires_grad_() for t in draw(3, 12))
    for _ in range(2):  # the second call adds to the first one's gradients in place
        torch.autograd.backward(add_norm(x, residual, weight), [torch.ones_like(x)] * 2)
    once = torch.autograd.grad(add_norm(x, residual, weight), x, [torch.ones_like(x)] * 2)[0]
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(residual.grad, 2 * once)


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_frozen_weight_costs_no_sums(is_trained, monkeypatch):
    x, residual, weight = draw(3, 20)
    assert_op(add_norm, add_norm_definition, [x, residual, weight], [True, True, is_trained])
    assert_op(norm, norm_definition, [x, weight], [True, is_trained])
    outputs = [norm(x.requires_grad_(), weight.requires_grad_(is_trained)), add_norm(x.detach(), x, weight)[0]]
    sums = []
    monkeypatch.setattr(rms_norm, "launch", lambda kernel, grid, arguments, **_: sums.append(arguments["partial_ptr"]))
    for y in outputs:
        y.sum().backward()
    assert [partial is not None for partial in sums] == [is_trained] * 2


def test_sums_of_a_weight_are_rounded_once():
    x, _, weight = draw(60, 256, dtype=torch.bfloat16)
    upstream = random(60, 256, dtype=torch.bfloat16, seed=1).abs() * x.sign()  # no part cancels another
    _, rstd = rms_norm.rms_norm_fwd(x, weight, EPS, 0.0)
    _, dweight = rms_norm.rms_norm_bwd(upstream, None, x, weight, rstd, 0.0, True)
    exact = (upstream.double() * x.double() * rstd.double()[:, None]).sum(0)
    torch.testing.assert_close(dweight, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_rows_of_zeros_and_of_large_values():
    weight = torch.ones(16, device=DEVICE)
    x = torch.zeros(2, 16, dtype=torch.float16, device=DEVICE)
    x[1] = 6e4  # its square is beyond fp16
    y = norm(x, weight)
    torch.testing.assert_close(y[0], x[0])
    torch.testing.assert_close(y[1], torch.ones_like(y[1]))


def test_the_number_of_programs():
    """Never more than there are tiles, else a multiple of the card's processors; none without rows."""
    for T, H in ((0, 64), (3, 4096), (10**6, 128), (10**6, 2048), (10**6, 8192), (10**6, rms_norm.MAX_H)):
        x = torch.empty(T, H, dtype=torch.bfloat16, device="meta")
        with launch.record() as launches:
            _, dweight = rms_norm.rms_norm_bwd(x, x, x, x.new_empty(H), x.new_empty(T), 0.0, True)
        assert dweight.shape == (H,)
        assert len(launches) == (1 if T else 0)
        for noted in launches:
            programs = noted.arguments["partial_ptr"].shape[0]
            tiles = -(-T // noted.arguments["ROWS"])
            assert programs == tiles or (programs < tiles and programs % launch.UNKNOWN_CARD_PROCESSORS == 0)
