"""Gradients added up in place: as float64 has them, over micro-batches, copies, tied and frozen weights.

pytest tests/model/test_linear.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ochat.model import linear

BF16, FP32 = torch.bfloat16, torch.float32


def draw(*shape, seed=0, dtype=FP32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter(*shape, seed=0, dtype=FP32, copy=None, grad_dtype=None):
    made = nn.Parameter(draw(*shape, seed=seed, dtype=dtype))
    made.grad_dtype = grad_dtype or dtype
    if copy is not None:
        linear.keep_copies([made], copy)
        linear.fill_copies([made])
    return made


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    size_in=st.integers(1, 17),
    size_out=st.integers(1, 17),
    has_bias=st.booleans(),
)
def test_a_products_gradients_are_those_of_float64_over_micro_batches(tokens, size_in, size_out, has_bias):
    weight, bias = parameter(size_out, size_in), parameter(size_out, seed=1) if has_bias else None
    true_weight, true_bias = (None if p is None else p.detach().double().requires_grad_() for p in (weight, bias))
    for number, count in enumerate(tokens):
        x, dy = draw(count, size_in, seed=number).requires_grad_(), draw(count, size_out, seed=90 + number)
        true_x = x.detach().double().requires_grad_()
        y = linear.linear(x, weight, bias)
        expected = torch.nn.functional.linear(true_x, true_weight, true_bias)
        torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
        y.backward(dy)
        expected.backward(dy.double())
        torch.testing.assert_close(x.grad, true_x.grad.float(), atol=1e-5, rtol=1e-5)
    for found, truth in ((weight, true_weight), (bias, true_bias)):
        if found is not None:
            torch.testing.assert_close(found.grad, truth.grad.float(), atol=1e-5, rtol=1e-5)


def products(weight, count, dtype=BF16):
    """(x, dy) of so many micro-batches."""
    for number in range(count):
        yield (
            draw(33, weight.shape[1], seed=number, dtype=dtype),
            draw(33, weight.shape[0], seed=50 + number, dtype=dtype),
        )


@pytest.mark.parametrize("master", [FP32, BF16])
def test_bf16_products_are_added_up_in_fp32(master):
    """Each is rounded to bf16 once on a CPU, the sum never: at most half a bf16 step of one product."""
    weight = parameter(24, 40, dtype=master, copy=BF16, grad_dtype=FP32)
    truth = torch.zeros(24, 40, dtype=torch.float64)
    for x, dy in products(weight, 8):
        linear.linear(x.requires_grad_(), weight).backward(dy)
        truth += dy.double().T @ x.detach().double()
    assert weight.grad.dtype == FP32
    worst = max((dy.double().T @ x.double()).abs().max() for x, dy in products(weight, 8))
    assert (weight.grad - truth).abs().max() <= 8 * 2**-9 * worst
    in_bf16 = sum((dy.T @ x for x, dy in products(weight, 8)), torch.zeros(24, 40, dtype=BF16))
    assert (weight.grad - truth).norm() < 0.7 * (in_bf16 - truth).norm()


def test_later_products_are_added_to_the_first_ones_memory():
    weight, places = parameter(6, 5), set()
    for x, dy in products(weight, 3, FP32):
        linear.linear(x, weight).backward(dy)
        places.add(weight.grad.data_ptr())
    assert len(places) == 1


def test_a_copy_gives_the_bits_of_a_cast():
    plain, copied = parameter(7, 12), parameter(7, 12, copy=BF16)
    for use in (lambda p: linear.linear(draw(5, 12, dtype=BF16), p), lambda p: linear.cast(p, BF16)):
        assert torch.equal(use(plain), use(copied))
    x = draw(5, 12, seed=3, dtype=BF16).requires_grad_()
    (a,), (b,) = (torch.autograd.grad(linear.linear(x, p).float().square().sum(), [x]) for p in (plain, copied))
    assert torch.equal(a, b)
    for p in (plain, copied):
        linear.cast(p, BF16).float().square().sum().backward()
    assert torch.equal(plain.grad, copied.grad) and plain.grad.dtype == FP32
    with torch.no_grad():
        copied.mul_(3)
    assert not torch.equal(linear.copy_of(copied), copied.to(BF16))
    linear.fill_copies([copied, plain])
    assert torch.equal(linear.copy_of(copied), copied.to(BF16)) and linear.copy_of(plain) is None


@settings(deadline=None, max_examples=30)
@given(
    ids=st.lists(st.integers(0, 4), min_size=0, max_size=20), has_sum=st.booleans(), dtype=st.sampled_from([FP32, BF16])
)
def test_a_table_gets_the_gradients_of_the_rows_that_were_looked_up(ids, has_sum, dtype):
    """A tied head has written its own first."""
    table, ids = parameter(5, 3), torch.tensor(ids, dtype=torch.int64)
    before = draw(5, 3, seed=8) if has_sum else torch.zeros(5, 3)
    if has_sum:
        table.grad = before.clone()
    rows = linear.look_up(ids, table, dtype)
    assert rows.dtype == dtype and torch.equal(rows, table.detach()[ids].to(dtype))
    dy = draw(len(ids), 3, seed=4, dtype=dtype)
    rows.backward(dy)
    truth = before.double().index_add(0, ids, dy.double())
    torch.testing.assert_close(table.grad, truth.float(), atol=1e-6, rtol=1e-6)


def test_who_waits_for_a_gradient_is_told_once_it_is_complete():
    """Like autograd, which tells by itself of the first."""
    table, told = parameter(5, 3), []
    table.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.clone()))
    total, is_there = linear.start_gradient(table)
    assert not is_there and not told and total is table.grad
    total.fill_(1.0)
    linear.look_up(torch.tensor([1, 1]), table, FP32).backward(torch.ones(2, 3))
    assert len(told) == 1 and torch.equal(told[0], torch.tensor([1.0, 3, 1, 1, 1])[:, None].expand(5, 3))
    assert linear.start_gradient(table)[1]
    weight, told = parameter(4, 3), []
    weight.register_post_accumulate_grad_hook(lambda p: told.append(p))
    for _ in range(2):
        linear.linear(torch.ones(2, 3), weight).sum().backward()
    assert len(told) == 2


def test_frozen_and_computed_weights_are_left_to_autograd():
    frozen = parameter(4, 3).requires_grad_(False)
    x = draw(2, 3).requires_grad_()
    linear.linear(x, frozen).sum().backward()
    assert frozen.grad is None and x.grad is not None
    leaf = draw(4, 3).requires_grad_()
    linear.linear(x, leaf * 2).sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * x.detach().sum(0).expand(4, 3))
