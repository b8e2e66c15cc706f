"""The definitions compiled for a CPU: their values and gradients, for odd shapes, and less kept for backward.

pytest tests/kernels/test_compiled_definitions.py
"""

import weakref

import ochat_kernels
import pytest
import torch
from ochat_kernels import Dynamic, compiled, reference
from torch.autograd.graph import saved_tensors_hooks

pytestmark = pytest.mark.skipif(not compiled.has_compiler(), reason="needs a C++ compiler")
BF16 = torch.bfloat16


def draw(*shape, seed=0, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def calls(tokens):
    """Of each operator: a function of it and the leaves, and the leaves."""
    angles = draw(tokens, 3, dtype=torch.float32).detach()
    labels = torch.arange(tokens) % 37
    labels[::3] = -100
    weights = torch.linspace(-0.5, 1.0, tokens)
    return {
        "rms_norm": (lambda f, x, w: f(x, w, 1e-5, 1.0), [draw(tokens, 21), draw(21, seed=1)]),
        "add_rms_norm": (
            lambda f, x, r, w: f(x, r, w, 1e-5), [draw(tokens, 21), draw(tokens, 21, seed=1), draw(21, seed=2)],
        ),
        "rope": (lambda f, q, k: f(q, k, angles.cos(), angles.sin()), [draw(tokens, 3, 7), draw(tokens, 1, 7, seed=1)]),
        "qkv_rope": (lambda f, qkv: f(qkv, angles.cos(), angles.sin(), 3, 1), [draw(tokens, 5 * 7)]),
        "qkv_norm_rope": (
            lambda f, qkv, a, b: f(qkv, a, b, angles.cos(), angles.sin(), 3, 1, 1e-5),
            [draw(tokens, 5 * 7), draw(7, seed=1), draw(7, seed=2)],
        ),
        "swiglu": (lambda f, x: f(x), [draw(tokens, 2 * 19)]),
        "linear_cross_entropy": (
            lambda f, h, w: f(h, w, labels, weights, chunk_rows=4, softcap=5.0)[:3:2],
            [draw(tokens, 11), draw(37, 11, seed=1)],
        ),
        **{
            kind: (
                lambda f, h, w, kind=kind: f(h, w, labels, weights, chunk_rows=4, dynamic=Dynamic(kind))[::2],
                [draw(tokens, 11), draw(37, 11, seed=1)],
            )
            for kind in ("eaft", "unlikelihood")
        },
    }  # fmt: skip


def outputs_and_gradients(call, function, leaves):
    outputs = call(function, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    made = [each for each in outputs if each.requires_grad]
    upstream = [draw(*each.shape, seed=9, dtype=each.dtype).detach() for each in made]
    return [*(each.detach() for each in outputs), *torch.autograd.grad(made, leaves, upstream)]


@pytest.mark.parametrize("name", calls(1))
def test_values_and_gradients_are_those_of_float64(name):
    """By the rule of all kernels: at most twice the definition's error, plus 1e-3 of the largest value in bf16. For one
    token torch compiles anew: one norm tries it, and the head's last chunk has one."""
    for tokens in (5, 1, 33) if name == "rms_norm" else (5, 33):
        call, leaves = calls(tokens)[name]
        function = name if hasattr(reference, name) else "linear_cross_entropy"
        ours, theirs = (outputs_and_gradients(call, getattr(each, function), leaves) for each in (compiled, reference))
        wide = [x.detach().double().requires_grad_() for x in leaves]
        truth = outputs_and_gradients(call, getattr(reference, function), wide)
        for found, plain, wanted in zip(ours, theirs, truth, strict=True):
            assert found.dtype == plain.dtype
            found, plain = ((each.double() - wanted).abs().max() for each in (found, plain))
            assert found <= 2 * plain + 1e-3 * wanted.abs().max()


def kept_bytes(function, *inputs):
    """Of what is kept for backward, the inputs apart."""
    known, kept = {x.untyped_storage().data_ptr() for x in inputs}, weakref.WeakSet()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.add(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
        return sum(each.nbytes() for each in kept), out


def test_less_is_kept_for_backward():
    x = draw(33, 2 * 19)
    ours, theirs = (kept_bytes(each.swiglu, x)[0] for each in (compiled, reference))
    assert ours < theirs / 4


def test_every_operator_is_there():
    ops = ochat_kernels.load("compiled")
    assert all(hasattr(ops, name) for name in reference.__all__)
