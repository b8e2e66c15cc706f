"""Weights by the model's own probabilities: the textbook with autograd in float64, extremes, and what they are for."""

import math

import ochat_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import Dynamic, lce_kernels, reference, triton_ops
from ochat_kernels.dynamic_weights import KINDS
from torch import Tensor

from tests.kernels.harness import DEVICE, loss_inputs

IMPLEMENTATIONS = [triton_ops, reference]
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def textbook(z: Tensor, labels: Tensor, w: Tensor, dynamic: Dynamic, cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, weight) of each row of logits z, float64, with autograd through what is not detached."""
    z = cap * torch.tanh(z / cap) if cap else z
    live = (labels != -100) & (w != 0)
    log_p = z.log_softmax(-1)
    nll = -log_p.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    p, entropy = (-nll).exp().detach(), torch.special.entr(log_p.exp()).sum(-1).detach()
    used = {
        "dft": w * p,
        "eaft": w * (entropy / dynamic.full_entropy).clamp_max(1) ** dynamic.alpha,
        "unlikelihood": w,
    }[dynamic.kind]
    loss = used * nll
    if dynamic.kind == "unlikelihood":
        label = torch.nn.functional.one_hot(labels.clamp_min(0), z.shape[1]).bool()
        rest = z.logsumexp(-1) - z.masked_fill(label, -math.inf).logsumexp(-1)  # -ln(1 - p)
        loss = torch.where(w < 0, -w * rest, loss)
    return torch.where(live, loss, 0), torch.where(live, used, 0)


def numbers(kind: str, full_entropy: float = 2.0) -> Dynamic:
    return Dynamic(kind, alpha=1.7, full_entropy=full_entropy) if kind == "eaft" else Dynamic(kind)


@given(
    sizes=st.tuples(st.integers(0, 17), st.integers(1, 9), st.integers(2, 23)),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
    chunk_rows=st.integers(1, 20),
    cap=st.sampled_from([0.0, 1.5]),
    into=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_definition_is_the_textbook(sizes, kind, seed, chunk_rows, cap, into):
    hidden, weight, labels, weights = loss_inputs(*sizes, torch.float64, seed)
    ours, theirs = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    total, options = torch.ones_like(weight), {"chunk_rows": chunk_rows, "softcap": cap, "dynamic": numbers(kind)}
    if into:
        options |= {"grad_weight": total, "accumulate": True}
    out = reference.linear_cross_entropy(*ours, labels, weights, **options)
    loss, used = textbook(theirs[0] @ theirs[1].T, labels, weights.double(), numbers(kind), cap)
    (out.loss_sum * (1 if into else 0.37)).backward()
    (loss.sum() * (1 if into else 0.37)).backward()
    torch.testing.assert_close(out.loss_sum, loss.sum())
    torch.testing.assert_close(out.effective, used)
    plain = reference.linear_cross_entropy(hidden, weight, labels, weights, softcap=cap)
    torch.testing.assert_close((out.nll, out.weight_sum, out.correct), (plain.nll, plain.weight_sum, plain.correct))
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(total - 1 if into else ours[1].grad, theirs[1].grad)
    assert (ours[1].grad is None) == into


def of_logits(
    logits: Tensor, labels: Tensor, weights: Tensor, dynamic: Dynamic, cap: float = 0.0
) -> tuple[Tensor, ...]:
    """(loss, weight, nll, correct, gradient) of the kernel; between rows, in memory, NaN."""
    n, V = logits.shape
    padded = logits.new_full((n, -(-V // 64) * 64), float("nan"))
    padded[:, :V] = logits
    stats, used = lce_kernels.RowStatistics(n, logits.device, has_loss=True), weights.clone()
    lce_kernels.lce_stats(padded[:, :V], labels, used, stats.slice(0, n), cap, True, dynamic)
    assert (padded[:, V:] == 0).all()
    return stats.loss, used, stats.nll, stats.correct.bool(), padded[:, :V]


@given(
    data=st.data(), dtype=st.sampled_from(list(ROUNDING)), kind=st.sampled_from(KINDS), cap=st.sampled_from([0.0, 4.0])
)
@settings(max_examples=60, deadline=None)
def test_the_kernel_at_ties_and_infinities(data, dtype, kind, cap):
    """Rows of few values in vocabularies about whole lanes and blocks, labels about the first of the largest, weights
    of both signs."""
    lane = 16 // dtype.itemsize
    block = lce_kernels.block_size(torch.empty(0, 10_000, dtype=dtype))
    V = data.draw(st.sampled_from([2, lane, lane + 1, 3 * lane - 1, block - 1, block, block + 1, 2 * block + lane]))
    values = data.draw(st.lists(st.sampled_from([-math.inf, -30.0, -1.5, 0.0, -0.0, 7.0, 30.0]), min_size=1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.tensor(values)[torch.randint(len(values), (1, V), generator=generator)].to(DEVICE, dtype)
    logits[0, :2] = logits[0, :2].nan_to_num(neginf=1.0)  # a label and one other are possible
    first = int(logits[0].argmax())
    around = {0, 1, V - 1, *(min(max(first + step, 0), V - 1) for step in (-lane, -1, 0, 1, lane))}
    possible = sorted(label for label in around if cap or logits[0, label] != -math.inf)
    label = torch.tensor([data.draw(st.sampled_from(possible))], device=DEVICE)
    w = torch.tensor([data.draw(st.sampled_from([2.0, -0.5]))], device=DEVICE)
    dynamic = numbers(kind, full_entropy=12.0)  # no row has as much
    exact = logits.double().requires_grad_()
    expected = textbook(exact, label, w.double(), dynamic, cap)
    expected[0].sum().backward()
    loss, used, nll, correct, gradient = of_logits(logits, label, w, dynamic, cap)
    torch.testing.assert_close((loss.double(), used.double()), expected, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(gradient.double(), exact.grad.nan_to_num(0.0), rtol=ROUNDING[dtype], atol=6e-6)
    capped = cap * torch.tanh(logits.double() / cap) if cap else logits.double()
    torch.testing.assert_close(nll.double(), -capped.log_softmax(1)[:, label[0]], rtol=1e-6, atol=1e-6)
    assert bool(correct) == (label.item() == int(capped.argmax()))


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("gap", [100.0, 20.0, 1.0, -20.0, -100.0])
@pytest.mark.parametrize("cap", [0.0, 300.0])
@pytest.mark.filterwarnings("ignore:overflow")  # of the label's tile, in the interpreter; its element is written again
def test_a_probability_near_0_or_1_is_exact_and_bounded(ops, gap, cap):
    """1 - p of a logit 20 above the others is 1e-8, which fp32 does not tell from 0."""
    labels, w = torch.tensor([3, 3], device=DEVICE), torch.tensor([-2.0, 1.5], device=DEVICE)
    z = torch.linspace(-1, 1, 40, device=DEVICE)
    z[3] = gap
    weight, hidden = z[:, None].clone().requires_grad_(), torch.ones(2, 1, device=DEVICE)
    exact = z.double().expand(2, -1).clone().requires_grad_()
    loss, _ = textbook(exact, labels, w.double(), Dynamic("unlikelihood"), cap)
    loss.sum().backward()
    for row in range(2):
        weight.grad = None
        one = slice(row, row + 1)
        out = ops.linear_cross_entropy(
            hidden[one], weight, labels[one], w[one], softcap=cap, dynamic=Dynamic("unlikelihood")
        )
        out.loss_sum.backward()
        torch.testing.assert_close(out.loss_sum.double(), loss[row], rtol=2e-6, atol=2e-6 * abs(gap))
        torch.testing.assert_close(weight.grad[:, 0].double(), exact.grad[row], rtol=1e-4, atol=1e-6)
        assert weight.grad.norm() <= 2**0.5 * w[row].abs() + 1e-5


@pytest.mark.filterwarnings("ignore:divide by zero")  # ln 0, in the interpreter
def test_entropy_counts_from_none_to_all():
    """A certain row weighs nothing, a flat one its whole weight, half the entropy half or by alpha."""
    even = torch.zeros(400)
    half = torch.where(torch.arange(400) < 20**0.5, 0.0, -1e4)  # 5 likely tokens
    sure = torch.where(torch.arange(400) < 1, 0.0, -1e4)
    weight = torch.stack([even, half, sure], dim=1).to(DEVICE)  # (V, 3): logits of three one-hot hidden states
    labels, w = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.full((3,), 2.0, device=DEVICE)
    for ops in IMPLEMENTATIONS:
        for alpha in (1.0, 2.0):
            out = ops.linear_cross_entropy(
                torch.eye(3, device=DEVICE), weight, labels, w, dynamic=Dynamic("eaft", alpha)
            )
            expected = [2.0, 2 * (math.log(5) / math.log(20)) ** alpha, 0.0]
            torch.testing.assert_close(out.effective.tolist(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_rows_that_are_not_live_weigh_nothing(ops, kind):
    hidden, weight, labels, weights = loss_inputs(13, 7, 50, torch.float32)
    dead = (labels == -100) | (weights == 0)
    hidden[dead] = math.nan
    every = torch.arange(13, device=DEVICE)
    out = ops.linear_cross_entropy(hidden, weight, labels, weights, rows=every, dynamic=Dynamic(kind))
    assert (out.effective[dead] == 0).all() and (out.effective[~dead] != 0).all()
    assert torch.isfinite(out.loss_sum)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_a_gradient_written_or_added_is_the_one_of_backward(ops, kind):
    hidden, weight, labels, weights = loss_inputs(13, 7, 50, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    options = {"chunk_rows": 4, "dynamic": Dynamic(kind)}
    apart = torch.autograd.grad(
        ops.linear_cross_entropy(hidden, weight, labels, weights, **options).loss_sum, (hidden, weight)
    )
    total = torch.full_like(weight, math.nan).detach()
    for times in (1, 2):
        out = ops.linear_cross_entropy(
            hidden, weight, labels, weights, grad_weight=total, accumulate=times > 1, **options
        )
        (grad_hidden,) = torch.autograd.grad(out.loss_sum, hidden)
        torch.testing.assert_close((grad_hidden, total), (apart[0], times * apart[1]))


def descend(dynamic: Dynamic | None, steps: int = 500) -> tuple[Tensor, Tensor]:
    """(loss, largest number of the parameters) after gradient descent on hidden states and head; half of the labels
    are to be unlearned."""
    hidden, weight, labels, _ = loss_inputs(12, 8, 30, torch.float32)
    w = torch.where(torch.arange(12, device=DEVICE) % 2 == 0, 1.0, -1.0)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for _ in range(steps):
        loss = reference.linear_cross_entropy(*leaves, labels, w, dynamic=dynamic).loss_sum
        for x, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
            x.data -= 0.1 * gradient
    return loss.detach(), torch.stack([x.detach().abs().max() for x in leaves]).max()


def test_unlikelihood_converges_where_a_negative_nll_diverges():
    loss, largest = descend(Dynamic("unlikelihood"))
    assert 0 <= loss < 0.5 and largest < 10
    loss, largest = descend(None)
    assert not loss > -1e4 and not largest < 100


def test_the_package_names_it():
    assert ochat_kernels.Dynamic is Dynamic and Dynamic("eaft").full_entropy == math.log(20)
