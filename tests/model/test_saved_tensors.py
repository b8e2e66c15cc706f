"""Every operator of selective recompute: no result is kept for backward, and gradients are bitwise those of keeping it.

What the policies keep of whole models is in test_recompute_policies.py.
"""

import weakref
from contextlib import nullcontext

import ochat_kernels
import pytest
import torch

from ochat.model.saved_tensors import SelectiveRecompute


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


X, WIDE, WEIGHT, OTHER, QKV = draw(5, 8), draw(5, 16), draw(8, seed=1), draw(8, seed=2), draw(5, 6, 8)
COS, SIN = draw(5, 3, seed=3).detach().cos(), draw(5, 3, seed=3).detach().sin()
CALLS = {
    "rms_norm": lambda ops: ops.rms_norm(X, WEIGHT, 1e-5),
    "rms_norm, offset": lambda ops: ops.rms_norm(X, WEIGHT, 1e-5, 1.0),
    "add_rms_norm, offset": lambda ops: ops.add_rms_norm(X, WIDE[:, 8:] * 1, WEIGHT, 1e-5, offset=1.0)[0],
    "rope": lambda ops: ops.rope(QKV[:, :3], QKV[:, 3:5], COS, SIN)[1],
    **{
        f"qkv_norm_rope, {name}": lambda ops, i=i: ops.qkv_norm_rope(
            QKV.flatten(1), WEIGHT, OTHER, COS, SIN, 2, 2, 1e-5, 1.0
        )[i]
        for i, name in enumerate("qkv")
    },
    "swiglu": lambda ops: ops.swiglu(WIDE),
    "geglu": lambda ops: ops.geglu(WIDE),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_result_is_made_again_and_gradients_are_the_same(name):
    ops, leaves = SelectiveRecompute(ochat_kernels.load("reference")), [X, WIDE, WEIGHT, OTHER, QKV, draw(8, 4, seed=5)]
    found, kept = [], []
    for policy in (nullcontext, ops.recomputing):
        with policy():
            result = CALLS[name](ops)
            y = result @ leaves[-1]  # whose backward wants the result
        memory = weakref.ref(result.untyped_storage())
        del result
        kept.append(memory() is not None)
        found.append(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True))
    assert kept == [True, False]
    assert sum(gradient is not None for gradient in found[0]) > 1
    for of_kept, of_remade in zip(*found, strict=True):
        assert of_remade is None if of_kept is None else torch.equal(of_kept, of_remade)
