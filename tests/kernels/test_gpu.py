"""What only a card can show: real sizes, no hidden waits, memory, offsets past 2^31, no compiling in mid-run.

python -m pytest tests/kernels -m gpu
"""

import contextlib

import pytest
import torch
import triton
from ochat_kernels import reference, triton_ops

from tests.kernels.harness import assert_op, operators, random
from tests.numerics import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
CARD = torch.device("cuda")
BF16 = torch.bfloat16
EPS = 1e-5
MIB = 2**20
SLACK = 256 * MIB  # a chunk's rows, statistics, the matrix library's workspace


@pytest.fixture
def plain_mode():
    """Deterministic mode fills fresh memory and takes other paths inside torch: off where time or memory is the law."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


def drawn(*shape, seed=0, dtype=BF16, scale=1.0):
    """Normal values drawn on the card; the harness's are drawn on the CPU, too slow for billions."""
    generator = torch.Generator(CARD).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=CARD, dtype=dtype).mul_(scale)


def head_inputs(T, H, V, *, live, dtype=BF16):
    """Hidden, weight, labels, loss weights of any sign, and the rows of the `live` first tokens of a random order."""
    order = torch.randperm(T, generator=torch.Generator().manual_seed(7))
    rows = order[:live].sort().values.to(CARD)
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(8)).to(CARD)
    weights = torch.zeros(T, device=CARD).index_copy_(0, rows, drawn(live, dtype=torch.float32, seed=9))
    return drawn(T, H, dtype=dtype), drawn(V, H, seed=1, dtype=dtype, scale=H**-0.5), labels, weights, rows


@contextlib.contextmanager
def syncs_forbidden():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def compilations(monkeypatch):
    """The kernels that Triton makes ready for new kinds of arguments meanwhile, from its cache on disk or not."""
    names = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **seen: names.append(seen["src"].name))
    yield names
    monkeypatch.undo()


def peak_bytes(call):
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step(function, leaves):
    """Forward and backward under gradients of ones."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def test_the_head_at_its_real_size():
    """The accuracy rule at H 4096 and an odd vocabulary, weights of any sign, a quarter of the rows not live. The
    truth is the definition in float64, which makes its logits a slice of rows at a time."""
    hidden, weight, labels, weights, rows = head_inputs(4096, 4096, 128257, live=3072)

    def of(module):
        return lambda hidden, weight: module.linear_cross_entropy(hidden, weight, labels, weights, rows=rows).loss_sum

    assert_op(of(triton_ops), of(reference), [hidden, weight])


def test_what_the_head_says_of_each_token():
    hidden, weight, labels, weights, rows = head_inputs(2048, 2048, 128257, live=1000)
    labels[rows[::3]] = (hidden[rows[::3]] @ weight.T).argmax(-1)  # so that some are correct
    got, expected = (
        m.linear_cross_entropy(hidden, weight, labels, weights, rows=rows) for m in (triton_ops, reference)
    )
    truth = reference.linear_cross_entropy(hidden.double(), weight.double(), labels, weights, rows=rows)
    assert_close(got.nll, expected.nll, truth.nll, atol=1e-4)
    assert_close(got.loss_sum, expected.loss_sum, truth.loss_sum, atol=1e-2)
    torch.testing.assert_close(got.weight_sum, expected.weight_sum)
    assert expected.correct.sum() > 300
    assert (got.correct != expected.correct).sum() <= 3  # near ties


@pytest.mark.parametrize("H", [4096, 2048])
def test_norms_at_real_sizes(H):
    x, residual, weight = (random(*shape, dtype=BF16) for shape in [(4096, H), (4096, H), (H,)])
    assert_op(lambda x, w: triton_ops.rms_norm(x, w, EPS), lambda x, w: reference.rms_norm(x, w, EPS), [x, weight])
    ops = [lambda x, r, w, m=module: m.add_rms_norm(x, r, w, EPS) for module in (triton_ops, reference)]
    assert_op(*ops, [x, residual, weight])


@pytest.mark.parametrize(("N", "K", "D"), [(32, 8, 128), (32, 8, 64), (64, 8, 128)])
def test_rotations_and_gates_at_real_sizes(N, K, D):
    q, k = random(4096, N, D, dtype=BF16), random(4096, K, D, dtype=BF16, seed=1)
    angles = random(4096, D // 2, seed=2)
    cos, sin = angles.cos(), angles.sin()
    assert_op(*[lambda q, k, m=m: m.rope(q, k, cos, sin) for m in (triton_ops, reference)], [q, k])
    qkv, weights = random(4096, (N + 2 * K) * D, dtype=BF16), [random(D, dtype=BF16, seed=seed) for seed in (3, 4)]
    assert_op(*[lambda x, m=m: m.qkv_rope(x, cos, sin, N, K) for m in (triton_ops, reference)], [qkv])
    ops = [lambda *x, m=m: m.qkv_norm_rope(*x, cos, sin, N, K, EPS) for m in (triton_ops, reference)]
    assert_op(*ops, [qkv, *weights])
    for name in ("swiglu", "geglu"):
        assert_op(*[getattr(m, name) for m in (triton_ops, reference)], [random(1024, 2 * N * D, dtype=BF16)])


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "add_rms_norm", "rope", "qkv_rope", "qkv_norm_rope", "swiglu", "geglu", "linear_cross_entropy"],
)
def test_nothing_waits_for_the_gpu(name, plain_mode):
    function, leaves = operators(2048, 2048, BF16)[name]
    step(function, leaves)  # compiles
    with syncs_forbidden():
        step(function, leaves)


def adamw_arguments(dtype, num_tensors=4):
    shapes = [(1024, 512), (1000,), (77, 3), (4096, 256)][:num_tensors]
    lists = {name: [drawn(*shape, dtype=dtype, seed=i) for shape in shapes]
             for i, name in enumerate(["params", "grads", "exp_avgs", "exp_avg_sqs"])}  # fmt: skip
    lists["exp_avg_sqs"] = [x.square() for x in lists["exp_avg_sqs"]]
    return lists | {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_the_optimizer_does_not_wait_and_compiles_once(dtype, plain_mode, monkeypatch):
    """With other gradients, another step and another rate each time, and a scale that only the card knows."""
    arguments, scale = adamw_arguments(dtype), torch.tensor(0.5, device=CARD)
    triton_ops.adamw(**arguments, lr=1e-3, step=1, grad_scale=scale)
    with compilations(monkeypatch) as compiled, syncs_forbidden():
        for count in (2, 3, 16, 17):
            arguments["grads"] = [grad * 1.5 for grad in arguments["grads"]]
            triton_ops.adamw(**arguments, lr=1e-3 / count, step=count, grad_scale=scale, seed=count)
    assert compiled == []


def test_another_number_of_live_rows_compiles_nothing(plain_mode, monkeypatch):
    """The batches of a run have any number of live rows; Triton tells apart only whether 16 divides it."""

    def once(live):
        hidden, weight, labels, weights, rows = head_inputs(4096, 512, 32002, live=live)
        step(lambda h, w: triton_ops.linear_cross_entropy(h, w, labels, weights, rows=rows).loss_sum, [hidden, weight])

    for live in (1001, 1024, 4096):
        once(live)
    with compilations(monkeypatch) as compiled:
        for live in (2, 17, 555, 1000, 1040, 2049, 4095):
            once(live)
    assert compiled == []


@pytest.mark.parametrize(("T", "H", "V", "chunk_rows"), [(8192, 4096, 128256, 2048), (8192, 2048, 32002, 1024)])
def test_memory_of_the_head(T, H, V, chunk_rows, plain_mode):
    """One chunk of logits, dW once in fp32 and once in its own dtype, dhidden before and after scaling."""
    hidden, weight, labels, weights, rows = head_inputs(T, H, V, live=T)

    def run():
        step(lambda h, w: triton_ops.linear_cross_entropy(h, w, labels, weights, rows=rows, chunk_rows=chunk_rows)
             .loss_sum, [hidden, weight])  # fmt: skip

    run()
    logits, dw, dhidden = chunk_rows * V * 2, V * H * 4, T * H * 2
    assert peak_bytes(run) <= max(logits + dw + dhidden, dw + dw // 2 + 2 * dhidden) + SLACK


def test_rows_without_weight_cost_no_memory(plain_mode):
    """The default chunk follows the live rows, so an eighth of them needs less than half of the memory."""

    def peak(live):
        hidden, weight, labels, weights, rows = head_inputs(8192, 1024, 128256, live=live)
        return peak_bytes(lambda: triton_ops.linear_cross_entropy(hidden, weight, labels, weights, rows=rows))

    peak(1024)  # the workspace of the matrix library
    assert peak(1024) < peak(8192) / 2


def assert_ends_agree(op, definition, inputs, upstream, rows=8):
    """Row-wise operators at more than 2^31 elements: the first and last rows are what they are alone."""
    leaves = [x.requires_grad_() for x in inputs]
    y = op(*leaves)
    got = [y.detach(), torch.autograd.grad(y, leaves[0], upstream)[0]]
    for ends in (slice(0, rows), slice(-rows, None)):
        x = inputs[0][ends].detach().requires_grad_()
        alone = definition(x, *inputs[1:])
        for big, small in zip(got, [alone, torch.autograd.grad(alone, x, upstream[ends])[0]], strict=True):
            torch.testing.assert_close(big[ends], small.detach(), rtol=2e-2, atol=2e-2)  # bf16, rounded once


@pytest.mark.parametrize("name", ["swiglu", "rms_norm"])
def test_rows_past_two_to_the_31(name, plain_mode):
    width = {"swiglu": 14336, "rms_norm": 4096}[name]
    T = 2**31 // width + 100  # the outputs, too, are past it
    if name == "swiglu":
        return assert_ends_agree(triton_ops.swiglu, reference.swiglu, [drawn(T, 2 * width)], drawn(T, width, seed=1))
    ops = [lambda x, w, m=module: m.rms_norm(x, w, EPS) for module in (triton_ops, reference)]
    return assert_ends_agree(*ops, [drawn(T, width), drawn(width, seed=2)], drawn(T, width, seed=1))


def test_rope_past_two_to_the_31(plain_mode):
    """q and k as views of one packed product of more than 2^31 elements."""
    T = 2**31 // 6144 + 100
    packed = drawn(T, 48, 128)
    q, k = packed[:, :32], packed[:, 32:40]
    angles = drawn(T, 64, seed=1, dtype=torch.float32)
    got = triton_ops.rope(q, k, angles.cos(), angles.sin())
    of_product = triton_ops.qkv_rope(packed.flatten(1), angles.cos(), angles.sin(), 32, 8)
    assert all(map(torch.equal, of_product, (*got, packed[:, 40:])))
    for ends in (slice(0, 8), slice(-8, None)):
        alone = reference.rope(q[ends], k[ends], angles[ends].cos(), angles[ends].sin())
        for big, small in zip(got, alone, strict=True):
            torch.testing.assert_close(big[ends], small, rtol=2e-2, atol=2e-2)


def test_a_chunk_of_logits_past_two_to_the_31(plain_mode):
    """All rows at once give what chunks of a thousand rows give."""
    T, V = 2**31 // 128257 + 100, 128257
    hidden, weight, labels, weights, rows = head_inputs(T, 64, V, live=T)
    results = []
    for chunk_rows in (T, 1024):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        out = triton_ops.linear_cross_entropy(*leaves, labels, weights, rows=rows, chunk_rows=chunk_rows)
        results.append((out.nll, out.correct.float(), *torch.autograd.grad(out.loss_sum, leaves)))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=2e-2, atol=2e-2)
