"""The fused head against its definition: loss, nll, accuracy and gradients, under every option."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ochat_kernels import Dynamic, launch, lce_kernels, reference
from ochat_kernels import linear_cross_entropy as head
from ochat_kernels.dynamic_weights import KINDS
from torch import Tensor

from tests.kernels.harness import ATOL, DEVICE, assert_op, likelihood_weight, loss_inputs, random
from tests.numerics import assert_close

CAPPED = {"softcap": 2.0}
TRANSFORMED = {"weight_transform": likelihood_weight}
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DYNAMIC = [{"dynamic": Dynamic(kind, alpha=0.5, full_entropy=4.0)} for kind in KINDS]
OPTIONS = [{}, CAPPED, TRANSFORMED, CAPPED | TRANSFORMED, *DYNAMIC, *(CAPPED | each for each in DYNAMIC)]


def title(options: dict) -> str:
    dynamic = options.get("dynamic")
    return "+".join([*(name for name in options if name != "dynamic"), *([dynamic.kind] if dynamic else [])]) or "plain"


def compare(case: tuple[Tensor, Tensor, Tensor, Tensor], **options) -> None:
    """Loss and both gradients by the accuracy rule, then what else is returned."""
    hidden, weight, labels, weights = case

    def loss(implementation):
        return lambda h, w: implementation.linear_cross_entropy(h, w, labels, weights, **options).loss_sum

    assert_op(loss(head), loss(reference), [hidden, weight])
    got = head.linear_cross_entropy(hidden, weight, labels, weights, **options)
    expected = reference.linear_cross_entropy(hidden, weight, labels, weights, **options)
    truth = reference.linear_cross_entropy(hidden.double(), weight.double(), labels, weights, **options)
    assert_close(got.nll, expected.nll, truth.nll, ATOL[hidden.dtype])
    assert torch.equal(got.correct, expected.correct)
    assert torch.equal(got.weight_sum, expected.weight_sum)
    assert got.nll.dtype == got.loss_sum.dtype == torch.float32 and not got.nll.requires_grad
    if "dynamic" not in options:
        assert got.effective is expected.effective is None
        return
    assert_close(got.effective, expected.effective, truth.effective, ATOL[hidden.dtype])
    assert got.effective.dtype == torch.float32 and not got.effective.requires_grad


@pytest.mark.parametrize("options", OPTIONS, ids=title)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_option_in_chunks(dtype, options):
    compare(loss_inputs(13, 7, 301, dtype), chunk_rows=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [CAPPED, TRANSFORMED, *DYNAMIC, CAPPED | DYNAMIC[-1]], ids=title)
def test_a_row_of_several_blocks_and_an_odd_end(dtype, options):
    compare(loss_inputs(3, 6, several_blocks(dtype) + 77, dtype), **options)


def several_blocks(dtype: torch.dtype) -> int:
    """A vocabulary of two whole blocks."""
    return 2 * lce_kernels.block_size(torch.empty(0, 10_000, dtype=dtype))


def statistics(logits: Tensor, labels: list[int], softcap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, correct, gradient) of the kernels for rows of logits as they are, each of weight 2; in memory their rows
    are apart by a multiple of 64."""
    n, V = logits.shape
    padded = logits.new_full((n, -(-V // 64) * 64), float("nan"))
    padded[:, :V] = logits
    stats = lce_kernels.RowStatistics(n, logits.device)
    y, w = torch.tensor(labels, device=DEVICE), torch.full((n,), 2.0, device=DEVICE)
    lce_kernels.lce_stats(padded[:, :V], y, w, stats.slice(0, n), softcap, True)
    assert (padded[:, V:] == 0).all()
    return stats.nll, stats.correct.bool(), padded[:, :V]


@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=40, deadline=None)
def test_ties_and_infinities(data, dtype):
    """Rows of few values, so that many logits are the largest, in vocabularies about whole lanes, blocks and none."""
    lane, block = 16 // dtype.itemsize, several_blocks(dtype) // 2
    V = data.draw(st.sampled_from([1, 2, lane, lane + 1, 3 * lane - 1, block - 1, block, block + 1, 2 * block + lane]))
    values = data.draw(st.lists(st.sampled_from([-math.inf, -30.0, -1.5, 0.0, -0.0, 7.0, 30.0]), min_size=1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.tensor(values)[torch.randint(len(values), (1, V), generator=generator)].to(DEVICE, dtype)
    first = int(logits[0].argmax())
    if logits[0, first] == -math.inf:
        logits[0, first] = 1.0
    around = sorted({0, V - 1, *(min(max(first + step, 0), V - 1) for step in (-lane, -1, 0, 1, lane))})
    label = data.draw(st.sampled_from(around))
    nll, correct, gradient = statistics(logits, [label])
    exact = logits.double().log_softmax(1)
    assert bool(correct) == (label == first)
    torch.testing.assert_close(nll, -exact[:, label].float(), rtol=1e-6, atol=1e-6)
    expected = exact.exp()
    expected[0, label] -= 1
    torch.testing.assert_close(gradient.double(), 2 * expected, rtol=ROUNDING[dtype], atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["in a whole block", "in the partial block", "at the very end"])
def test_the_label_of_any_block(dtype, where):
    V = several_blocks(dtype) + 100
    label = {"in a whole block": V // 3, "in the partial block": V - 50, "at the very end": V - 1}[where]
    logits = random(2, V, dtype=dtype)
    logits[1, label] = logits[1].max() + 1
    nll, correct, gradient = statistics(logits, [label] * 2, softcap=5.0)
    capped = 5 * torch.tanh(logits.double() / 5)
    exact = capped.log_softmax(1)
    torch.testing.assert_close(nll, -exact[:, label].float(), rtol=1e-6, atol=1e-6)
    assert correct.tolist() == (exact.argmax(1) == label).tolist() and correct[1]
    expected = exact.exp()
    expected[:, label] -= 1
    expected *= 2 * (1 - (capped / 5) ** 2)
    torch.testing.assert_close(gradient.double(), expected, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("column", [0, 20, 299])
def test_a_logit_that_is_no_number_is_loud(bad, column):
    logits = random(1, 300)
    logits[0, column] = bad
    for label in (20, 21):
        nll, _, _ = statistics(logits, [label])
        assert not nll.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_live_get_zeros_whatever_they_hold(dtype):
    logits = torch.full((2, 300), math.nan, dtype=dtype, device=DEVICE)
    nll, correct, gradient = statistics(logits, [-100, -100])
    assert not nll.any() and not correct.any() and (gradient == 0).all()


def test_long_rows_are_few_at_a_time():
    """So that the second look at a row still finds it in the L2; a processor holds up to 64 warps."""
    for V, warps in ((128256, 32), (49152, 32), (32000, 16), (1031, 8)):
        logits = torch.empty(0, V, dtype=torch.bfloat16, device="meta")
        assert lce_kernels.num_warps(logits) == warps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_most_logits_reach_and_one_that_none_does(dtype):
    hidden, *others = loss_inputs(11, 8, 200, dtype)
    compare((hidden * 100, *others), softcap=30.0)
    compare((hidden / 16, *others), softcap=30.0)


@given(
    T=st.integers(0, 9), H=st.integers(1, 9), V=st.integers(1, 200), chunk=st.integers(1, 5), seed=st.integers(0, 99)
)
@settings(max_examples=24, deadline=None)
def test_any_shape(T, H, V, chunk, seed):
    options = OPTIONS[seed % len(OPTIONS)]
    assume(V > 1 or "unlikelihood" not in title(options))  # of one token: infinite
    compare(loss_inputs(T, H, V, torch.float32, seed), chunk_rows=chunk, **options)


def test_rows_that_are_not_live_never_enter():
    hidden, weight, labels, weights = loss_inputs(13, 7, 50, torch.float32)
    dead = (labels == -100) | (weights == 0)
    assert dead.any() and not dead.all()
    hidden[dead] = float("nan")
    hidden.requires_grad_()
    out = head.linear_cross_entropy(hidden, weight, labels, weights, rows=(~dead).nonzero().squeeze(1))
    out.loss_sum.backward()
    assert torch.isfinite(out.loss_sum) and torch.isfinite(hidden.grad).all()
    assert (hidden.grad[dead] == 0).all() and (out.nll[dead] == 0).all() and not out.correct[dead].any()


ORDERED = [{}, {"weight_transform": lambda nll, weights: torch.ones_like(weights)}, *DYNAMIC]


@pytest.mark.parametrize("options", ORDERED, ids=title)
def test_rows_in_any_order_and_dead_ones_among_them_change_nothing(options):
    hidden, weight, labels, weights = loss_inputs(13, 7, 50, torch.float32)
    labels[4], weights[4] = (hidden[4] @ weight.T).argmax(), 0.0  # would be correct, but weighs nothing
    every = torch.arange(13, device=DEVICE)
    results = []
    for implementation in (head, reference):
        for rows in (None, every, every.flip(0)):
            h = hidden.clone().requires_grad_()
            out = implementation.linear_cross_entropy(h, weight, labels, weights, rows=rows, chunk_rows=5, **options)
            out.loss_sum.backward()
            results.append(
                (out.loss_sum, out.nll, out.correct, h.grad, *([out.effective] if out.effective is not None else []))
            )
    for got in results[1:]:
        torch.testing.assert_close(got, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "everything"])
def test_only_what_needs_a_gradient_is_computed(frozen, monkeypatch):
    hidden, weight, labels, weights = loss_inputs(6, 5, 40, torch.float32)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    made, add = [], head._Gradients.add
    monkeypatch.setattr(head._Gradients, "add", lambda self, *arguments: made.append(self) or add(self, *arguments))
    with torch.set_grad_enabled(frozen != "everything"):
        out = head.linear_cross_entropy(hidden, weight, labels, weights)
    sizes = {(g.hidden.numel(), g.weight.numel()) for g in made}
    assert sizes == {{"hidden": (0, 200), "weight": (30, 0), "everything": (0, 0)}[frozen]}
    assert out.loss_sum.requires_grad == (frozen != "everything")
    assert not out.nll.requires_grad
    if frozen != "everything":
        out.loss_sum.backward()
        assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


@pytest.mark.parametrize("implementation", [head, reference])
def test_nothing_supervised_stays_connected(implementation):
    hidden, weight, labels, weights = loss_inputs(6, 5, 40, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    labels.fill_(-100)
    for rows in (None, torch.empty(0, dtype=torch.int64, device=DEVICE)):
        hidden.grad = weight.grad = None
        out = implementation.linear_cross_entropy(hidden, weight, labels, weights, rows=rows)
        out.loss_sum.backward()
        assert out.loss_sum == 0 == out.weight_sum
        assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_equal_logits_are_won_by_the_first():
    hidden = torch.ones(3, 1, device=DEVICE)
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5]], device=DEVICE)
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    out = head.linear_cross_entropy(hidden, weight, labels, torch.ones(3, device=DEVICE))
    assert out.correct.tolist() == [True, False, False]


def test_logits_far_from_zero_do_not_overflow():
    hidden = torch.tensor([[1.0]], device=DEVICE)
    weight, ones = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE), torch.ones(1, device=DEVICE)
    for label, nll in ((0, 0.0), (1, 2e4)):
        out = head.linear_cross_entropy(hidden, weight, torch.full_like(ones, label).long(), ones)
        assert out.nll.item() == nll


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "itemsize", "expected"),
    [
        (16384, 128256, 2, 8192),  # 2 GiB of bf16
        (16384, 32000, 2, 8192),  # no more than 8192 rows
        (12288, 128256, 2, 6144),  # two equal chunks, not 8192 and 4096
        (16384, 2_000_000, 2, 1024),  # no fewer than 1024
        (16384, 128256, 4, 4096),
        (700, 128256, 2, 768),  # whole tiles of 128 rows
        (0, 128256, 2, 128),
    ],
)
def test_chunk_size(num_rows, vocab_size, itemsize, expected):
    assert head.chunk_size(num_rows, vocab_size, itemsize) == expected


@pytest.mark.parametrize("kind", ["", *KINDS])
def test_a_chunk_of_rows_is_one_launch_and_every_row_of_logits_starts_on_a_line(kind):
    T, H, V = 5000, 64, 128257
    hidden, weight = (torch.empty(n, H, dtype=torch.bfloat16, device="meta") for n in (T, V))
    labels, weights = torch.empty(T, dtype=torch.int64, device="meta"), torch.empty(T, device="meta")
    rows = torch.empty(3000, dtype=torch.int64, device="meta")
    with launch.record() as launches:
        head.lce_fwd(hidden, weight, labels, weights, rows, 1024, 0.0, "", kind, 1.0, 3.0, True, True)
    assert [item.arguments["logits_ptr"].shape[0] for item in launches] == [1024, 1024, 952]
    assert {item.arguments["stride_zn"] * 2 % 128 for item in launches} == {0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5, 2)}, "expected \\(T, H\\) and \\(V, H\\)"),
        ({"hidden": torch.zeros(5, 3, dtype=torch.float64), "weight": torch.zeros(4, 3).double()}, "expected float32"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, "expected int64 \\(5,\\)"),
        ({"loss_weights": torch.zeros(5, dtype=torch.int64)}, "expected float"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"softcap": float("inf")}, "softcap is inf"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "one device"),
        ({"hidden": torch.zeros(5, 3, dtype=torch.bfloat16)}, "expected one dtype"),
        ({"labels": torch.zeros(5)}, "expected int64"),
        ({"rows": torch.zeros(2)}, "expected int64 \\(R,\\)"),
        ({"chunk_rows": 0}, "at least 1"),
        ({"dynamic": Dynamic("focal")}, "dynamic is 'focal': expected dft, eaft, unlikelihood"),
        ({"dynamic": Dynamic("eaft", alpha=0.0)}, "dynamic.alpha is 0.0: expected a number above 0"),
        ({"dynamic": Dynamic("eaft", full_entropy=math.inf)}, "dynamic.full_entropy is inf"),
        (TRANSFORMED | {"dynamic": Dynamic("dft")}, "weight_transform and dynamic 'dft' both change the weights"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "hidden": torch.zeros(5, 3),
        "weight": torch.zeros(4, 3),
        "labels": torch.zeros(5, dtype=torch.int64),
        "loss_weights": torch.ones(5),
    } | change
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) and not v.is_meta else v for k, v in arguments.items()}
    for implementation in (head, reference):
        if implementation is reference and "expected float32" in message:
            continue
        with pytest.raises(ValueError, match=message):
            implementation.linear_cross_entropy(**on_device)


def test_a_label_outside_the_vocabulary_is_loud(monkeypatch):
    hidden, weight, labels, weights = loss_inputs(6, 5, 40, torch.float32)
    labels[2], weights[2] = 40, 1.0
    for implementation in (head, reference) if DEVICE.type == "cpu" else ():
        with pytest.raises(ValueError, match=r"labels\[2\] is 40: expected -100 or 0 to 39"):
            implementation.linear_cross_entropy(hidden, weight, labels, weights)
    monkeypatch.setattr(head, "check_labels", lambda labels, vocab_size: None)  # as on a card, where looking would wait
    assert head.linear_cross_entropy(hidden, weight, labels, weights).loss_sum.isnan()
