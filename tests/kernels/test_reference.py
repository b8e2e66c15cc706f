"""The operators' definitions against formulas written out again in float64, and against autograd."""

import ochat_kernels
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import likelihood_weight, loss_inputs
from tests.numerics import relative_error

ops = ochat_kernels.load("reference")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def whole_loss(hidden, weight, labels, weights, cap=0.0, transform=None):
    """sum w * nll by the textbook: all logits at once, float64; both options written out."""
    logits = hidden @ weight.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    live = (labels != -100) & (weights != 0)
    nll = -F.log_softmax(logits, -1).gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    used = weights.double() if transform is None else transform(nll.detach(), weights.double())
    return (nll * used * live).sum(), torch.where(live, nll.detach(), 0)


@given(
    sizes=st.tuples(st.integers(0, 17), st.integers(1, 9), st.integers(1, 23)),
    seed=st.integers(0, 999),
    chunk_rows=st.integers(1, 20),
    give_rows=st.booleans(),
    cap=st.sampled_from([0.0, 1.5]),
    transform=st.sampled_from([None, likelihood_weight]),
)
@settings(max_examples=80, deadline=None)
def test_loss_and_gradients_equal_the_textbook(sizes, seed, chunk_rows, give_rows, cap, transform):
    hidden, weight, labels, weights = loss_inputs(*sizes, torch.float64, seed)
    rows = ((labels != -100) & (weights != 0)).nonzero().squeeze(1) if give_rows else None
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    options = {"rows": rows, "chunk_rows": chunk_rows, "softcap": cap, "weight_transform": transform}
    out = ops.linear_cross_entropy(*ours, labels, weights, **options)
    expected, nll = whole_loss(*theirs, labels, weights, cap, transform)
    (out.loss_sum * 0.37).backward()  # the upstream gradient counts
    (expected * 0.37).backward()
    torch.testing.assert_close(out.loss_sum, expected)
    torch.testing.assert_close(out.weight_sum.double(), (weights.abs() * (labels != -100)).sum().double())
    torch.testing.assert_close(out.nll, nll)
    live = (labels != -100) & (weights != 0)
    assert torch.equal(out.correct, live & ((hidden @ weight.T).argmax(1) == labels))
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, torch.zeros_like(a) if b.grad is None else b.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_the_truth(dtype):
    hidden, weight = draw(64, 32, dtype=dtype), draw(101, 32, seed=1, dtype=dtype)
    labels, weights = torch.arange(64) % 101, torch.linspace(-1, 1, 64)
    small = [t.clone().requires_grad_() for t in (hidden, weight)]
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    out = ops.linear_cross_entropy(*small, labels, weights, chunk_rows=7)
    truth, _ = whole_loss(*wide, labels, weights)
    out.loss_sum.backward()
    truth.backward()
    assert out.loss_sum.dtype == out.nll.dtype == torch.float32
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-5  # bf16 logits carry 8 bits
    for a, b in zip(small, wide, strict=True):
        assert relative_error(a.grad, b.grad) < bound


def test_rms_norm_is_its_formula_and_add_rms_norm_its_sum():
    x, residual, weight = draw(7, 12), draw(7, 12, seed=1), draw(12, seed=2)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-3), expected)
    torch.testing.assert_close(ops.rms_norm(x, weight - 1, 1e-3, 1.0), expected)
    for offset in (0.0, 1.0):
        y, total = ops.add_rms_norm(x, residual, weight, 1e-3, offset)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(y, ops.rms_norm(x + residual, weight, 1e-3, offset))


def test_an_offset_is_added_in_fp32():
    x, weight = draw(9, 64, dtype=torch.bfloat16), draw(64, seed=1, dtype=torch.bfloat16) / 100
    exact = ops.rms_norm(x.double(), weight.double(), 1e-5, 1.0)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5, 1.0), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("turned", [8, 6, 2])
def test_rope_turns_each_pair_by_its_angle(turned):
    half = turned // 2
    q, k, angles = draw(5, 3, 8), draw(5, 1, 8, seed=1), draw(5, half, seed=2)
    turned_q, turned_k = ops.rope(q, k, angles.cos().float(), angles.sin().float())
    for x, y in ((q, turned_q), (k, turned_k)):
        complex_x = torch.complex(x[..., :half], x[..., half:turned]) * torch.exp(1j * angles.float().double())[:, None]
        expected = torch.cat((complex_x.real, complex_x.imag, x[..., turned:]), -1)
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("turned", [8, 4])
def test_a_product_is_split_normed_by_heads_and_turned(turned, offset):
    parts, angles = (draw(5, 3, 8), draw(5, 2, 8, seed=1), draw(5, 2, 8, seed=5)), draw(5, turned // 2, seed=2)
    qkv, (q, k, v) = torch.cat(parts, dim=1).flatten(1), parts
    weights, cos, sin = (draw(8, seed=3), draw(8, seed=4)), angles.cos(), angles.sin()
    normal = [ops.rms_norm(x, weight, 1e-3, offset) for x, weight in zip((q, k), weights, strict=True)]
    expected = (*ops.rope(*normal, cos, sin), v)
    torch.testing.assert_close(ops.qkv_norm_rope(qkv, *weights, cos, sin, 3, 2, 1e-3, offset), expected)
    plain = ops.qkv_rope(qkv, cos, sin, 3, 2)
    assert all(map(torch.equal, plain, (*ops.rope(q, k, cos, sin), v)))
    for result in plain:
        assert result.is_contiguous() and result.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


def test_a_gate_stands_in_the_first_half():
    gate_up = draw(5, 14)
    gate, up = gate_up[:, :7], gate_up[:, 7:]
    torch.testing.assert_close(ops.swiglu(gate_up), gate * torch.sigmoid(gate) * up)
    gelu = gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(ops.geglu(gate_up), gelu * up)


def test_gradients_of_the_definitions_are_their_differences():
    """Through fp64, where autograd's gradients must be what small steps show."""
    x, residual, weight = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(3, 6), (3, 6), (6,)]))
    q, k = draw(3, 2, 6, seed=4).requires_grad_(), draw(3, 1, 6, seed=5).requires_grad_()
    qkv = draw(3, 4 * 6, seed=8).requires_grad_()
    angles, other = draw(3, 2, seed=6), draw(6, seed=7).requires_grad_()
    cos, sin = angles.cos(), angles.sin()
    for function, leaves in (
        (lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-3, 1.0), (x, residual, weight)),
        (lambda qkv, a, b: ops.qkv_norm_rope(qkv, a, b, cos, sin, 2, 1, 1e-3, 1.0), (qkv, weight, other)),
        (lambda qkv: ops.qkv_rope(qkv, cos, sin, 2, 1), (qkv,)),
        (lambda q, k: ops.rope(q, k, cos, sin), (q, k)),
        (ops.swiglu, (x,)),
        (ops.geglu, (x,)),
    ):
        assert torch.autograd.gradcheck(function, leaves)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="reference"):
        ochat_kernels.load("cuda")
