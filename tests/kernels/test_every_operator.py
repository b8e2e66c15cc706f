"""What holds for every kernel: the same bits again and checkpointed, the same values compiled without graph break."""

import pytest
import torch

from tests.kernels.harness import operators, random

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALLS = operators(6, 10, torch.float32, DEVICE)


def gradients(function, leaves):
    """Outputs and gradients under random upstream gradients."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    upstream = [random(*y.shape, dtype=y.dtype, device=y.device, seed=i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, upstream))


@pytest.mark.parametrize("name", CALLS)
def test_again_checkpointed_and_compiled(name):
    function, leaves = CALLS[name]
    plain = gradients(function, leaves)
    torch.testing.assert_close(gradients(function, leaves), plain, rtol=0, atol=0)

    def checkpointed(*leaves):
        return torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)

    torch.testing.assert_close(gradients(checkpointed, leaves), plain, rtol=0, atol=0)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, leaves), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, True, False), (False, False, True)])
def test_what_the_norms_register(wanted):
    leaves = [x.clone().requires_grad_(want) for x, want in zip(CALLS["add_rms_norm"][1], wanted, strict=True)]
    ops = torch.ops.ochat_kernels
    torch.library.opcheck(ops.rms_norm.default, (leaves[0], leaves[2], 1e-5))
    torch.library.opcheck(ops.add_rms_norm.default, (*leaves, 1e-5))
    x, grad, weight = (x.detach() for x in leaves)
    for grad_sum, need_weight in ((grad, True), (None, False)):
        torch.library.opcheck(ops.rms_norm_bwd.default, (grad, grad_sum, x, weight, x.new_ones(6), need_weight))


def test_what_the_others_register():
    ops = torch.ops.ochat_kernels
    q, k, _ = CALLS["rope"][1][0].split((3, 2, 2), dim=1)
    angles = [random(6, 5, dtype=torch.float32, device=DEVICE, seed=i) for i in range(2)]
    torch.library.opcheck(ops.rope.default, (q.clone().requires_grad_(), k.clone().requires_grad_(), *angles))
    torch.library.opcheck(ops.rope_bwd.default, (q, k, *angles))
    torch.library.opcheck(ops.swiglu.default, (CALLS["swiglu"][1][0].clone().requires_grad_(),))
    hidden, head = (x.clone().requires_grad_() for x in CALLS["linear_cross_entropy"][1])
    labels, weights = torch.arange(6, device=DEVICE), torch.ones(6, device=DEVICE)
    arguments = (hidden, head, labels, weights, None, 0, None, "", True, True)
    torch.library.opcheck(ops.linear_cross_entropy.default, arguments)
    torch.library.opcheck(ops.scale.default, (hidden.detach(), weights[0], torch.bfloat16))
