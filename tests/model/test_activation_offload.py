"""Block inputs in host memory come back unchanged, in buffers allocated once, the next ones ahead of time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ochat.model.saved_tensors import ActivationOffload


class Square(torch.autograd.Function):
    """Saves its inputs, as torch's checkpoint does with a block's."""

    @staticmethod
    def forward(ctx, *values):
        ctx.save_for_backward(*values)
        return sum(value.square().sum() for value in values)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(2 * value * gradient for value in ctx.saved_tensors)


class Copies(TorchDispatchMode):
    """The shapes of tensors that were copied, in order."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def blocks(offload, inputs):
    """The sum of all blocks' squares; `inputs`: of each block."""
    total = torch.zeros(())
    for index, values in enumerate(inputs):
        with offload.block(index):
            total = total + Square.apply(*values)
    offload.wait()
    return total


def drawn(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(offload, inputs):
    blocks(offload, inputs).backward()
    for value in (value for values in inputs for value in values):
        assert torch.equal(value.grad, 2 * value.detach()), value.shape


def test_gradients_are_of_the_values_that_were_saved():
    """Also where each forward has other values in the same buffers, other shapes, and a block with one input."""
    offload = ActivationOffload()
    for rows in (3, 3, 7, 1):
        narrow = drawn((rows, 5), (rows, 2), dtype=torch.bfloat16)
        check(offload, [drawn((rows, 5)), drawn((rows, 5), (rows, 2)), narrow])


def test_an_input_that_is_overwritten_later_comes_back_as_it_was():
    offload, value = ActivationOffload(), torch.arange(4.0, requires_grad=True)
    total = blocks(offload, [[value]])
    with torch.no_grad():
        value.fill_(9.0)
    total.backward()
    assert value.grad is not None and value.grad.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_buffers_are_allocated_once():
    offload, found = ActivationOffload(), []
    for _ in range(2):
        check(offload, [drawn((4, 2), (4, 2)) for _ in range(3)])
        found.append({key: buffer.data_ptr() for key, buffer in offload.buffers.items()})
    assert found[0] == found[1] and len(found[0]) == 6


def test_inputs_of_the_block_before_are_copied_ahead():
    total = blocks(ActivationOffload(), [drawn((n, 2), (n, 3)) for n in (1, 2, 3)])
    with Copies() as copies:
        total.backward()
    assert copies.shapes == [(3, 2), (2, 2), (2, 3), (3, 3), (1, 2), (1, 3)]


def test_a_backward_that_failed_leaves_nothing_stale():
    offload, fails = ActivationOffload(), drawn((2, 2), (2, 2))
    fails[1].register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        blocks(offload, [drawn((2, 2), (2, 2)), fails]).backward()
    check(offload, [drawn((2, 2), (2, 2)) for _ in range(2)])
