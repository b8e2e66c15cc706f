"""The multi-tensor AdamW kernel against its definition and torch's own, and the laws of stochastic rounding."""

import copy
from itertools import product
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import adamw, reference, reference_adamw
from ochat_kernels.launch import launch, record
from torch import Tensor

from tests.kernels.harness import ATOL, DEVICE, random
from tests.numerics import assert_close

FP32, BF16 = torch.float32, torch.bfloat16
COMBINATIONS = list(product((FP32, BF16), repeat=3))  # of parameters, gradients and moments
SIZES = (1, 5, 0, 1024, 2050, 48)
ANY = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3}
ALL_FP32, ALL_BF16 = (FP32, FP32, FP32), (BF16, BF16, BF16)
both = pytest.mark.parametrize("function", [adamw.adamw, reference.adamw], ids=["kernel", "definition"])
MANY = 2**17  # draws; a correlation of 5 / sqrt(MANY) = 0.014 shows


class Lists(NamedTuple):
    """What one call takes."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Lists":
        return Lists(*([x.to(dtype, copy=True) for x in tensors] for tensors in self))

    @property
    def written(self) -> list[Tensor]:
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]


def lists(sizes, dtypes, seed: int = 0) -> Lists:
    """Random values; the moments are those of a run that has begun."""
    param, grad, state = dtypes
    draws = [[random(n, seed=seed + 100 * i + k) for k, n in enumerate(sizes)] for i in range(4)]
    draws[3] = [root.square() for root in draws[3]]
    return Lists(*([x.to(d) for x in xs] for xs, d in zip(draws, (param, grad, state, state), strict=True)))


def copies_of(sizes) -> list[Tensor]:
    """Of parameters of these sizes, not yet written."""
    return [torch.full((n,), 7.0, dtype=BF16, device=DEVICE) for n in sizes]


def run(function, values: Lists, **options) -> Lists:
    """The lists after one step by `function`; those given stay as they are."""
    values = copy.deepcopy(values)
    function(*values, **(ANY | options))
    return values


def assert_step(values: Lists, **options) -> None:
    """Everything that the kernel writes obeys the accuracy rule."""
    got, expected = run(adamw.adamw, values, **options), run(reference.adamw, values, **options)
    truth = run(reference.adamw, values.to(torch.float64), **options)
    for op, definition, true in zip(got.written, expected.written, truth.written, strict=True):
        assert op.dtype == definition.dtype
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        assert_close(op, definition, true, ATOL[op.dtype] * scale)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values next to fp32 `x`, towards zero and away from it, in fp32."""
    word = x.view(torch.int32).to(torch.int64) >> 16 << 16
    towards = word.to(torch.int32).view(FP32)
    return towards, torch.where(towards == x, word, word + 0x10000).to(torch.int32).view(FP32)


def assert_unrelated(x: Tensor, y: Tensor) -> None:
    """Two sequences of 16 random bits: neither their values nor any pair of their bits go together."""
    limit = 5 / len(x) ** 0.5
    assert torch.corrcoef(torch.stack((x, y)).double())[0, 1].abs() < limit
    bits = [(v[None] >> torch.arange(16, device=v.device)[:, None] & 1).double() * 2 - 1 for v in (x, y)]
    assert (bits[0] @ bits[1].T / len(x)).abs().max() < limit


@both
@pytest.mark.parametrize(("lr", "weight_decay", "eps"), [(1e-2, 0.0, 1e-6), (1e-2, 0.1, 1.0), (0.0, 0.1, 1e-8)])
def test_fp32_is_torchs_adamw(function, lr, weight_decay, eps):
    ours = lists(SIZES, ALL_FP32)
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    options = {"lr": lr, "betas": (0.8, 0.95), "eps": eps, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(theirs, **options)
    for moment in (*ours.exp_avgs, *ours.exp_avg_sqs):
        moment.zero_()
    for step in range(1, 6):
        for i, (param, grad) in enumerate(zip(theirs, ours.grads, strict=True)):
            grad.copy_(random(*grad.shape, seed=10 * step + i))
            param.grad = grad.clone()
        optimizer.step()
        function(*ours, step=step, **options)
    moments = [[optimizer.state[p][name] for p in theirs] for name in ("exp_avg", "exp_avg_sq")]
    torch.testing.assert_close(
        ours.written, [*(p.detach() for p in theirs), *moments[0], *moments[1]], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
def test_every_combination_of_dtypes_with_a_scale_and_without(dtypes):
    values = lists(SIZES, dtypes)
    scale = torch.tensor(0.25, device=DEVICE)  # a power of two: the products are exact
    for options in ({}, {"grad_scale": scale}, {"grad_scale": scale, "skipped": torch.ones((), device=DEVICE)}):
        assert_step(values, **options)
    scaled = values._replace(grads=[g * 0.25 for g in values.grads])
    got, expected = run(adamw.adamw, values, grad_scale=scale), run(adamw.adamw, scaled)
    torch.testing.assert_close(got.written, expected.written, rtol=0, atol=0)


@both
@pytest.mark.parametrize("grad", [FP32, BF16])
def test_copies_are_the_new_parameters_rounded_to_nearest(function, grad):
    """Beside a step that is bit for bit that without them: of NaN and infinities and of halves between two neighbours
    (to even) as of any other value, in views that allow no wide accesses as in those that do."""
    values, shift = lists(SIZES, (FP32, grad, BF16)), [0, 1, 0, 0, 3, 8]
    values.grads[3][5], values.grads[3][6] = float("nan"), float("inf")
    values.params[4][:4], values.grads[4][:4], values.exp_avgs[4][:4] = 1.0, 0.0, 0.0
    values.params[4][:4] += torch.tensor([1, 3, -1, 5], device=DEVICE) * 2.0**-8  # bf16's are 2^-7 or 2^-8 apart here
    options = {"weight_decay": 0.0, "grad_scale": torch.tensor(0.25, device=DEVICE)}
    whole = run(function, values, **options)
    buffers = [torch.full((n + by + 1,), 7.0, dtype=BF16, device=DEVICE) for n, by in zip(SIZES, shift, strict=True)]
    copies = [buffer[by : by + n] for buffer, n, by in zip(buffers, SIZES, shift, strict=True)]
    got = run(function, values, copies=copies, **options)
    for with_copies, without in zip(got.written, whole.written, strict=True):
        assert torch.equal(with_copies.nan_to_num(), without.nan_to_num())
    torch.testing.assert_close(copies, [p.to(BF16) for p in got.params], rtol=0, atol=0, equal_nan=True)
    assert copies[3][5].isnan() and copies[4][:4].tolist() == [1.0, 1.015625, 0.99609375, 1.015625]
    for buffer, n, by in zip(buffers, SIZES, shift, strict=True):
        assert (buffer[:by] == 7.0).all() and (buffer[by + n :] == 7.0).all()


@both
def test_copies_of_pieces_are_those_of_the_whole(function):
    values, whole = lists([3000], (FP32, FP32, BF16)), copies_of([3000])
    run(function, values, copies=whole, ids=[4])
    cuts, copies = [(0, 1000), (1000, 2001), (2001, 3000)], copies_of([3000])
    parts = Lists(*([tensors[0][a:b] for a, b in cuts] for tensors in values))
    pieces = [copies[0][a:b] for a, b in cuts]
    run(function, parts, copies=pieces, ids=[4] * 3, offsets=[a for a, _ in cuts])
    assert torch.equal(copies[0], whole[0]) and copies[0].isfinite().all()


@both
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_is_not_finite_leaves_every_bit_as_it_is(function, scale):
    for dtypes in (ALL_FP32, ALL_BF16):
        values = lists(SIZES, dtypes)
        values.grads[3][7] = float("nan")
        copies = copies_of(SIZES) if dtypes == ALL_FP32 else None
        got = run(function, values, grad_scale=torch.tensor(scale, device=DEVICE), copies=copies)
        assert copies is None or all((copy == 7.0).all() for copy in copies)
        for after, before in zip(got.written, values.written, strict=True):
            assert torch.equal(after, before)


@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 16, 40, 1023, 1024, 1040]), max_size=4),
    gaps=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    dtypes=st.lists(st.sampled_from(COMBINATIONS), min_size=4, max_size=4),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(1, 10**6),
)
@settings(max_examples=20, deadline=None)
def test_views_of_one_buffer_and_nothing_else(sizes, gaps, dtypes, seed, step):
    parts = [lists([n], d, seed=seed % 97 + i) for i, (n, d) in enumerate(zip(sizes, dtypes, strict=False))]
    total = sum(sizes) + sum(gaps)
    buffers = {dtype: torch.full((4, total), 7.0, dtype=dtype, device=DEVICE) for dtype in (FP32, BF16)}
    untouched = torch.ones(total, dtype=torch.bool, device=DEVICE)
    values, end = Lists([], [], [], []), 0
    for part, size, gap in zip(parts, sizes, gaps, strict=False):
        start, end = end + gap, end + gap + size
        untouched[start:end] = False
        for which in range(4):
            tensor = part[which][0]
            values[which].append(buffers[tensor.dtype][which, start:end].copy_(tensor))
    expected = run(reference.adamw, values, seed=seed, step=step)
    adamw.adamw(*values, **(ANY | {"seed": seed, "step": step}))
    for got, want in zip(values.written, expected.written, strict=True):
        # a neighbour in bf16 where the fp32 values differ in their last bit
        torch.testing.assert_close(got, want, rtol=2**-7 if got.dtype == BF16 else 1e-5, atol=1e-6)
    assert all((buffer[:, untouched] == 7.0).all() for buffer in buffers.values())


def test_a_stored_value_is_a_neighbour_and_the_mean_is_kept():
    values = lists([MANY // 2], (BF16, FP32, BF16))
    exact = run(adamw.adamw, values.to(FP32))
    for seed in (0, 1):
        for stored, true in zip(run(adamw.adamw, values, seed=seed).written, exact.written, strict=True):
            towards, away = neighbours(true)
            assert ((stored == towards) | (stored == away)).all()
            ulp = torch.where(away == towards, 1.0, away - towards).double()
            fraction = (true - towards).double() / ulp
            excess = (stored.double() - true.double()) / ulp
            sigma = (fraction * (1 - fraction)).sum().sqrt()
            assert sigma > 50  # otherwise nothing is between two neighbours, and nothing tested
            assert excess.sum().abs() < 4 * sigma
            trend = (excess * (fraction - fraction.mean())).sum()  # right for small and large fractions alike
            assert trend.abs() < 4 * (fraction * (1 - fraction) * (fraction - fraction.mean()) ** 2).sum().sqrt()


@both
@pytest.mark.parametrize("first", [0, 2**32 - 1500])
def test_parts_of_a_tensor_are_rounded_as_within_the_whole(function, first):
    """In any order and company, given their tensor's id and offset, also across element 2^32."""
    values = lists([3000, 64], (BF16, FP32, BF16))
    whole = run(function, values, seed=5, ids=[4, 7], offsets=[first, 0])
    cuts = [(0, 0, 1000), (0, 1000, 2001), (0, 2001, 3000), (1, 0, 64)]
    parts = Lists(*([tensors[i][a:b] for i, a, b in cuts[::-1]] for tensors in values))
    places = {"ids": [7, 4, 4, 4], "offsets": [0, *(first + a for _, a, _ in cuts[2::-1])]}
    got = run(function, parts, seed=5, **places)
    for pieces, expected in ((got.params, whole.params), (got.exp_avgs, whole.exp_avgs), (got[3], whole[3])):
        assert torch.equal(torch.cat(pieces[:0:-1]), expected[0]) and torch.equal(pieces[0], expected[1])


@triton.jit
def _round_kernel(x_ptr, bits_ptr, y_ptr, N: tl.constexpr):
    lanes = tl.arange(0, N)
    bits = tl.load(bits_ptr + lanes).to(tl.uint32)
    tl.store(y_ptr + lanes, adamw.round_with(tl.load(x_ptr + lanes), bits, tl.bfloat16))


def test_rounding_of_every_kind_of_number():
    special = [0x0, 0x1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0x3F800000]
    words = torch.tensor(special + [0x80000000 | w for w in special] + [0] * 1008)
    words[16:] = torch.randint(2**32, (1008,), generator=torch.Generator().manual_seed(0))
    x = words.to(torch.int32).view(FP32).to(DEVICE)
    for drawn in (0, 0xFFFF, 0x7FFF, 1):
        bits = torch.full((1024,), drawn, device=DEVICE)
        y = x.new_empty(1024, dtype=BF16)
        launch(_round_kernel, (1,), {"x_ptr": x, "bits_ptr": bits, "y_ptr": y, "N": 1024})
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[x.isinf()].float(), x[x.isinf()])
        assert torch.equal(y.view(torch.int16), reference_adamw.stochastic_round(x, bits).view(torch.int16))


@pytest.mark.parametrize("dtypes", [ALL_FP32, ALL_BF16])
def test_nan_and_infinity_show(dtypes):
    values = lists([64], dtypes)
    values.grads[0][3], values.grads[0][5] = float("nan"), float("-inf")
    got = run(adamw.adamw, values)
    assert got.exp_avgs[0][5] == float("-inf") and got.exp_avg_sqs[0][5] == float("inf")
    for tensor in (got.params[0], got.exp_avgs[0], got.exp_avg_sqs[0]):
        assert tensor[3].isnan() and tensor.isfinite().sum() == 62


def test_the_random_bits_are_balanced():
    offsets = torch.arange(MANY)
    for seed, stream in product(range(3), reference_adamw.STREAMS):
        bits = reference_adamw.random_bits(reference_adamw.tensor_key(seed, 1, 0), offsets, stream)
        assert bits.min() >= 0 and bits.max() < 2**16
        ones = (bits[None] >> torch.arange(16)[:, None] & 1).double().sum(1)
        assert (ones - MANY / 2).abs().max() < 4.5 * MANY**0.5 / 2
        for shift in (0, 8):  # every byte equally often: chi-squared with 255 degrees of freedom, 4.5 sigma
            counts = (bits >> shift & 0xFF).bincount(minlength=256).double()
            assert abs((counts - MANY / 256).square().sum() / (MANY / 256) - 255) < 4.5 * 510**0.5


def test_the_random_bits_are_unrelated():
    def bits(seed=0, step=1, index=0, first=0, stream=0):
        key = reference_adamw.tensor_key(seed, step, index)
        return reference_adamw.random_bits(key, torch.arange(first, first + MANY), stream)

    for stream in reference_adamw.STREAMS:
        base = bits(stream=stream)
        for lag in (1, 2, 8, 1024, 2**16):
            assert_unrelated(base[:-lag], base[lag:])
        for other in ({"seed": 1}, {"step": 2}, {"index": 1}, {"first": 2**32}, {"first": 2**33}, {"first": 2**20}):
            assert_unrelated(base, bits(**other, stream=stream))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert_unrelated(bits(stream=one), bits(stream=other))


@pytest.mark.parametrize("begin", [0, 2**32])
def test_values_are_rounded_by_the_bits_of_their_seed_step_and_place(begin, monkeypatch):
    """The kernel believes that its tensors begin 2^32 elements earlier: offsets need 64 bits, and the hash has them."""
    size, tensors = 1100, range(2)

    def row(tensors, key, offset):
        addresses = (0 if x is None else x.data_ptr() - begin * x.itemsize for x in tensors)
        return [begin + size, key, offset, *addresses]

    monkeypatch.setattr(adamw, "_row", row)
    blocks = [[i, begin // adamw.BLOCK + block] for i in tensors for block in range(2)]
    programs = torch.tensor(blocks, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(adamw, "_programs", lambda sizes, device, stream: programs)
    values = lists([size] * len(tensors), (BF16, FP32, BF16))
    got, exact = run(adamw.adamw, values, seed=11), run(adamw.adamw, values.to(FP32))
    offsets = torch.arange(begin, begin + size, device=DEVICE)
    streams = {reference_adamw.PARAM: 0, reference_adamw.EXP_AVG: 2, reference_adamw.EXP_AVG_SQ: 3}
    for i, (stream, which) in product(tensors, streams.items()):
        bits = reference_adamw.random_bits(reference_adamw.tensor_key(11, ANY["step"], i), offsets, stream)
        assert torch.equal(got[which][i], reference_adamw.stochastic_round(exact[which][i], bits))


def test_one_launch_for_each_combination_of_dtypes():
    def step(count, n, dtypes, **options):
        numbers = {"lr": 1e-3, "beta_1": 0.9, "beta_2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1, "seed": 0}
        tensors = [[torch.empty(n, dtype=d, device="meta")] * count for d in (*dtypes, dtypes[-1])]
        with record() as launches:
            adamw.adamw_step(*tensors, [], None, None, **(numbers | options), ids=[0] * count, offsets=[0] * count)
        return launches

    for dtypes in COMBINATIONS:
        (one,) = step(3, 4096, dtypes)
        assert one.arguments["ALIGNED"] and len(one.arguments["programs_ptr"]) == 12
        (odd,) = step(1, 4095, dtypes)
        assert not odd.arguments["ALIGNED"]

    plain, shifted = torch.zeros(64), torch.zeros(65)[1:]
    with record() as launches:
        adamw.adamw_step(
            *[[plain, shifted, plain]] * 4, [], None, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 0, [0, 1, 2], [0, 0, 0]
        )
    assert [(x.arguments["ALIGNED"], len(x.arguments["programs_ptr"])) for x in launches] == [(True, 2), (False, 1)]

    def compiled_for(launches):
        numbers = {k: type(v) if isinstance(v, float) else v for k, v in launches[0].arguments.items()}
        return {k: v for k, v in numbers.items() if not isinstance(v, Tensor)}

    first = compiled_for(step(1, 64, ALL_BF16))
    for later in ({"step": 16, "seed": 1}, {"step": 17, "lr": 1.0, "seed": 2**40}, {"weight_decay": 0.0, "step": 2}):
        assert compiled_for(step(1, 64, ALL_BF16, **later)) == first


def test_what_the_operator_registers():
    """The parameters are written in place, those that require gradients too."""
    values, one = lists([48, 5], ALL_BF16), torch.ones((), device=DEVICE)
    arguments = (*values, [], one, one, 1e-3, 0.9, 0.99, 1e-8, 0.1, 3, 7, [4, 5], [0, 9])
    torch.library.opcheck(torch.ops.ochat_kernels.adamw.default, arguments)
    wide, copies = lists([48, 5], ALL_FP32), copies_of([48, 5])
    torch.library.opcheck(torch.ops.ochat_kernels.adamw.default, (*wide, copies, *arguments[5:]))
    before = [copy._version for copy in copies]
    adamw.adamw(*wide, copies=copies, **ANY)
    assert all(copy._version > old for copy, old in zip(copies, before, strict=True))
    version = values.params[0].requires_grad_()._version
    adamw.adamw(*values, **ANY)
    assert values.params[0].is_leaf and values.params[0]._version > version


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": lambda x: []}, "grads has 0 tensors: expected 1, one for each of params"),
        ({"grads": lambda x: [x[0].half()]}, r"grads\[0\] is torch.float16: expected float32 or bfloat16"),
        ({"exp_avgs": lambda x: [x[0][:2]]}, r"exp_avgs\[0\] is \(2, 6\) .* shape \(4, 6\)"),
        ({"exp_avgs": lambda x: [x[0].to("meta")]}, r"exp_avgs\[0\] is \(4, 6\) on meta"),
        ({"exp_avg_sqs": lambda x: [x[0].bfloat16()]}, r"expected that of exp_avgs\[0\], torch.float32"),
        ({"params": lambda x: [x[0].T.contiguous().T]}, r"params\[0\] has strides \(1, 4\): expected a contiguous"),
        ({"grad_scale": lambda x: torch.ones(1)}, r"grad_scale is torch.float32 \(1,\): expected float32 \(\)"),
        ({"grad_scale": lambda x: torch.ones((), device="meta")}, "grad_scale is on meta"),
        ({"skipped": lambda x: torch.ones((), dtype=torch.int64)}, r"skipped is torch.int64 \(\): expected float32"),
        ({"copies": lambda x: []}, "copies has 0 tensors: expected 1, one for each of params"),
        ({"copies": lambda x: [torch.ones(4, 6)]}, r"copies\[0\] is torch.float32: expected bfloat16"),
        ({"copies": lambda x: [torch.ones(6, dtype=BF16)]}, r"copies\[0\] is \(6,\) .* shape \(4, 6\)"),
        ({"copies": lambda x: [torch.ones(6, 4, dtype=BF16).T]}, r"copies\[0\] has strides \(1, 4\)"),
        ({"params": lambda x: [x[0].bfloat16()], "copies": lambda x: [torch.ones(4, 6, dtype=BF16)]},
         r"params\[0\] is torch.bfloat16: expected float32, since there are copies"),
        ({"lr": lambda x: -1.0}, "lr is -1.0"),
        ({"weight_decay": lambda x: float("nan")}, "weight_decay is nan"),
        ({"betas": lambda x: (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": lambda x: 0.0}, "eps is 0.0: expected a finite number above 0"),
        ({"step": lambda x: 0}, "step is 0: expected at least 1"),
        ({"seed": lambda x: -1}, "seed is -1"),
        ({"ids": lambda x: [1, 2]}, r"ids are \[1, 2\]: expected 1 integers"),
        ({"offsets": lambda x: [-1]}, r"offsets are \[-1\]: expected 1 integers from 0"),
    ],
)  # fmt: skip
def test_refuses(function, change, message):
    arguments = {name: [torch.ones(4, 6)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    for name, edit in change.items():
        arguments[name] = edit(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        function(**(ANY | arguments))
    with pytest.raises(ValueError, match=r"params\[0\] is on meta: the Triton kernels expect"):
        adamw.adamw(*[[torch.ones(4, device="meta")] for _ in range(4)], **ANY)
