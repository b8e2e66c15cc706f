"""The update of one parameter with its gradient's norm: adamw's own, bit for bit, unless the norm is not finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import adamw, adamw_with_norm, reference
from ochat_kernels.launch import record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.harness import DEVICE
from tests.kernels.test_adamw import ALL_BF16, ALL_FP32, ANY, BF16, COMBINATIONS, FP32, copies_of, lists

function = adamw_with_norm.adamw_with_norm
both_norms = pytest.mark.parametrize("function", [function, reference.adamw_with_norm], ids=["kernel", "definition"])


class Called(TorchDispatchMode):
    """The names of torch's operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def tensors(n: int, dtypes, seed: int = 0) -> list[Tensor]:
    """param, grad, exp_avg, exp_avg_sq of n elements."""
    return [x[0] for x in lists([n], dtypes, seed)]


def step(function, values: list[Tensor], **options) -> tuple[Tensor, list[Tensor]]:
    """The norm, and the tensors after one step; those given stay as they are."""
    values = [x.clone() for x in values]
    return function(*values, **(ANY | options)), values


@pytest.mark.parametrize("dtypes", COMBINATIONS, ids=str)
def test_it_is_adamw_bit_for_bit_beside_the_norm(dtypes):
    """Sizes of one block and many, of one program and several, and no elements; ids, offsets and skipped steps too."""
    for n in (0, 1, 5, 1024, 4097, 8192, 20000):
        values, copies = tensors(n, dtypes), [copies_of([n])[0] for _ in range(2)]
        is_copied = dtypes[0] == FP32
        places = {"seed": 7, "step": 5}
        expected = [[x.clone()] for x in values]
        more = {"skipped": torch.tensor(2.0, device=DEVICE), "copies": [copies[0]] if is_copied else None}
        adamw.adamw(*expected, **(ANY | places | more), ids=[4], offsets=[2**32 - 50])
        more = {"skipped": 2, "copy": copies[1] if is_copied else None}
        norm, got = step(function, values, **places, **more, tensor_id=4, offset=2**32 - 50)
        assert all(torch.equal(x, y) for x, (y,) in zip(got, expected, strict=True))
        assert torch.equal(*copies) and (not is_copied or torch.equal(copies[1], got[0].to(BF16)))
        torch.testing.assert_close(norm.double(), values[1].double().norm(), rtol=1e-6, atol=0)


def test_the_definition_is_the_norm_and_adamw():
    for dtypes in (ALL_FP32, ALL_BF16, (BF16, FP32, BF16)):
        values = tensors(300, dtypes)
        norm, got = step(reference.adamw_with_norm, values, skipped=1, tensor_id=3, offset=9)
        expected = [[x.clone()] for x in values]
        reference.adamw(*expected, **ANY, skipped=torch.ones((), device=DEVICE), ids=[3], offsets=[9])
        assert all(torch.equal(x, y) for x, (y,) in zip(got, expected, strict=True))
        assert torch.equal(norm, torch.linalg.vector_norm(values[1], dtype=FP32))


@both_norms
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 8191, 8192, 19999])
def test_a_gradient_that_is_not_finite_leaves_every_bit_as_it_is(function, bad, place):
    """Wherever it is: every program knows."""
    for dtypes in (ALL_FP32, ALL_BF16, (BF16, FP32, BF16)):
        values, copy = tensors(20000, dtypes), copies_of([20000])[0]
        values[1][place] = bad
        norm, got = step(function, values, copy=copy if dtypes == ALL_FP32 else None)
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(got, values, strict=True))
        assert not norm.isfinite() and (copy == 7.0).all()


def test_finite_values_with_a_norm_beyond_fp32_update_nothing_either():
    values = tensors(64, ALL_FP32)
    values[1].fill_(1e20)
    norm, got = step(function, values)
    assert norm.isinf() and all(torch.equal(x, y) for x, y in zip(got, values, strict=True))


@given(
    n=st.sampled_from([1, 7, 16, 1023, 1040, 8193]),
    shifts=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    dtypes=st.sampled_from(COMBINATIONS),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_views_at_any_address_and_nothing_else(n, shifts, dtypes, seed):
    values = [*tensors(n, dtypes, seed), *([torch.zeros(n, dtype=BF16, device=DEVICE)] if dtypes[0] == FP32 else [])]
    buffers = [
        torch.full((n + by + 9,), 7.0, dtype=x.dtype, device=DEVICE) for x, by in zip(values, shifts, strict=False)
    ]
    views = [b[by : by + n].copy_(x) for b, x, by in zip(buffers, values, shifts, strict=False)]
    norm, got = step(function, values[:4], copy=values[4] if values[4:] else None)
    again = function(*views[:4], **ANY, copy=views[4] if views[4:] else None)
    assert torch.equal(again, norm) and all(torch.equal(x, y) for x, y in zip(views, [*got, *values[4:]], strict=True))
    for buffer, by in zip(buffers, shifts, strict=False):
        assert (buffer[:by] == 7.0).all() and (buffer[by + n :] == 7.0).all()


def test_small_squares_beside_a_large_one_are_counted(monkeypatch):
    """In a plain sum in fp32 all of them would be lost. Few programs, so that each adds up several blocks."""
    monkeypatch.setattr(adamw_with_norm, "SUMS", 4)
    values = [torch.ones(100_000, dtype=BF16, device=DEVICE) for _ in range(4)]
    values[1][0] = 4096.0
    norm = step(function, values)[0]
    torch.testing.assert_close(norm.double(), values[1].double().norm(), rtol=1e-6, atol=0)


def test_two_launches_whose_order_of_sums_follows_from_the_size():
    def launches(n, dtypes=ALL_BF16, **options):
        numbers = {"lr": 1e-3, "beta_1": 0.9, "beta_2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 1, "skipped": 0}
        values = [torch.empty(n, dtype=d, device="meta") for d in (*dtypes, dtypes[-1])]
        with record() as noted, Called() as called:
            adamw_with_norm.adamw_with_norm_step(*values, None, **(numbers | {"key": 1, "offset": 0} | options))
        assert called.names == {"aten.new_empty.default"}  # nothing of torch's own runs
        return noted

    for n, sums in ((0, 1), (1, 1), (4096, 1), (4097, 2), (2**27, 512)):
        first, second = launches(n)
        assert first.arguments["sums_ptr"].shape == (sums,) and second.arguments["num_sums"] == sums

    def compiled_for(noted):
        free = {"num_sums", "key", "offset"}  # their kernel is not specialised for
        numbers = {k: type(v) if isinstance(v, float) else v for k, v in noted.arguments.items() if k not in free}
        return {k: v for k, v in numbers.items() if not isinstance(v, Tensor)}

    for later in ({"step": 16, "lr": 1.0}, {"step": 17, "skipped": 1, "key": -(2**63)}, {"offset": 2**40, "step": 2}):
        for first, second in zip(launches(4096), launches(4096, **later), strict=True):
            assert compiled_for(first) == compiled_for(second)


def test_what_the_operator_registers():
    values, copy = tensors(48, ALL_FP32), copies_of([48])[0]
    arguments = (1e-3, 0.9, 0.99, 1e-8, 0.1, 3, 1, 7, 9)
    for each in (copy, None):
        torch.library.opcheck(torch.ops.ochat_kernels.adamw_with_norm.default, (*values, each, *arguments))
    written = [values[0].requires_grad_(), values[2], values[3], copy]
    before = [x._version for x in written]
    norm = function(*values, **ANY, copy=copy)
    assert values[0].is_leaf and not norm.requires_grad
    assert all(x._version > old for x, old in zip(written, before, strict=True))


@both_norms
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.ones(4, 5)}, r"grads\[0\] is \(4, 5\) .* shape \(4, 6\)"),
        ({"exp_avg": torch.ones(6, 4).T}, r"exp_avgs\[0\] has strides"),
        ({"copy": torch.ones(4, 6)}, r"copies\[0\] is torch.float32: expected bfloat16"),
        ({"step": 3, "skipped": 3}, "skipped is 3: expected a count of the steps before step 3"),
        ({"skipped": -1}, "skipped is -1"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"offset": -1}, r"offsets are \[-1\]"),
        ({"tensor_id": 2**63}, r"ids are \["),
    ],
)
def test_refuses(function, change, message):
    arguments = {name: torch.ones(4, 6) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(ValueError, match=message):
        function(**(ANY | arguments | change))
