"""Inputs of blocks in host memory: they come back as they left, in buffers made once, the next ones ahead of time."""

import torch

from ochat.model.activation_offload import HostInputs


class Square(torch.autograd.Function):
    """Saves what it is given, as torch's checkpoint does with a block's inputs."""

    @staticmethod
    def forward(ctx, *values):
        ctx.save_for_backward(*values)
        return sum(value.square().sum() for value in values)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(2 * value * gradient for value in ctx.saved_tensors)


def blocks(held, inputs):
    """The sum of all blocks' squares; `inputs`: of each block."""
    total = torch.zeros(())
    for index, values in enumerate(inputs):
        with held.of_block(index):
            total = total + Square.apply(*values)
    held.settle()
    return total


def drawn(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def check(held, inputs):
    blocks(held, inputs).backward()
    for value in (value for values in inputs for value in values):
        assert torch.equal(value.grad, 2 * value.detach()), value.shape


def test_gradients_are_of_the_values_that_left():
    """Also where each forward has other values in the same buffers, other shapes, and a block with one input."""
    held = HostInputs()
    for rows in (3, 3, 7, 1):
        check(held, [drawn((rows, 5)), drawn((rows, 5), (rows, 2)), drawn((rows, 5), (rows, 2), dtype=torch.bfloat16)])


def test_what_is_overwritten_after_it_left_comes_back_as_it_was():
    held, value = HostInputs(), torch.arange(4.0, requires_grad=True)
    total = blocks(held, [[value]])
    with torch.no_grad():
        value.fill_(9.0)
    total.backward()
    assert value.grad is not None and value.grad.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_buffers_are_made_once():
    held, inputs = HostInputs(), [drawn((4, 2), (4, 2)) for _ in range(3)]
    check(held, inputs)
    first = {place: buffer.data_ptr() for place, buffer in held._buffers.items()}
    check(held, [drawn((4, 2), (4, 2)) for _ in range(3)])
    assert {place: buffer.data_ptr() for place, buffer in held._buffers.items()} == first and len(first) == 6


def test_the_block_before_comes_ahead_and_nothing_stays():
    held, come = HostInputs(), []
    fetch = held._fetch
    held._fetch = lambda place, device: (come.append(place), fetch(place, device))
    blocks(held, [drawn((2, 2), (2, 2)) for _ in range(3)]).backward()
    assert come.index((1, 0)) < come.index((2, 1)), come  # beside the first that is asked for
    assert not held._coming and not held._leaving


def test_a_backward_that_was_broken_off_leaves_nothing_stale():
    held, inputs = HostInputs(), [drawn((2, 2), (2, 2)) for _ in range(2)]
    blocks(held, inputs)
    held._fetch((0, 0), torch.device("cpu"))  # on its way when something failed
    check(held, [drawn((2, 2), (2, 2)) for _ in range(2)])
