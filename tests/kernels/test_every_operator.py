"""What holds for every kernel: the same bits again and checkpointed, the same values compiled without graph break, and
what it cannot take is refused."""

import pytest
import torch
from ochat_kernels import triton_ops

from tests.kernels.harness import DEVICE, operators, outputs_and_gradients, random

CALLS = operators(6, 10, torch.float32)


def gradients(function, leaves):
    return outputs_and_gradients(function, leaves, [True] * len(leaves), torch.float32)


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
    torch.library.opcheck(ops.rms_norm.default, (leaves[0], leaves[2], 1e-5, 1.0))
    torch.library.opcheck(ops.add_rms_norm.default, (*leaves, 1e-5, 0.0))
    x, grad, weight = (x.detach() for x in leaves)
    for grad_sum, need_weight in ((grad, True), (None, False)):
        arguments = (grad, grad_sum, x, weight, x.new_ones(6), 1.0, need_weight)
        torch.library.opcheck(ops.rms_norm_bwd.default, arguments)


def test_what_the_others_register():
    q, k, v = CALLS["rope"][1][0].split((3, 2, 2), dim=1)
    qkv = CALLS["rope"][1][0].flatten(1)
    angles = [random(6, 5, seed=i) for i in range(2)]
    norms = [random(10, seed=i) for i in range(2)]
    hidden, head = (x.clone().requires_grad_() for x in CALLS["linear_cross_entropy"][1])
    labels, weights = torch.arange(6, device=DEVICE), torch.ones(6, device=DEVICE)
    for name, arguments in {
        "rope": (q.clone().requires_grad_(), k.clone().requires_grad_(), *angles),
        "rope_bwd": (q, k, *angles),
        "qkv_rope": (qkv.clone().requires_grad_(), *angles, 3, 2),
        "qkv_rope_bwd": (q, k, v, *angles),
        "qkv_norm_rope": (qkv.clone().requires_grad_(), *norms, *angles, 3, 2, 1e-5, 1.0),
        "qkv_norm_rope_bwd": (q, k, v, qkv, *norms, *angles, random(6, 5), 0.0, True),
        "glu": (CALLS["swiglu"][1][0].clone().requires_grad_(), True),
        "glu_bwd": (random(6, 20), random(6, 10), False),
        "linear_cross_entropy": (hidden, head, labels, weights, None, 0, 2.0, "", "eaft", 1.0, 3.0, True, True),
        "scale": (hidden.detach(), weights[0], torch.bfloat16),
    }.items():
        torch.library.opcheck(getattr(torch.ops.ochat_kernels, name).default, arguments)


X, W, Q, K, ANGLES = (torch.zeros(shape) for shape in [(2, 4), (4,), (3, 4, 8), (3, 2, 8), (3, 4)])
GOOD = {"rms_norm": (X, W, 1e-5), "add_rms_norm": (X, X, W, 1e-5), "rope": (Q, K, ANGLES, ANGLES), "swiglu": (X,)}
QKV, HEAD = torch.zeros(3, 64), torch.zeros(8)
GOOD |= {"geglu": (X,), "qkv_rope": (QKV, ANGLES, ANGLES, 4, 2)}
GOOD |= {"qkv_norm_rope": (QKV, HEAD, HEAD, ANGLES, ANGLES, 4, 2, 1e-5)}
REFUSED = [
    ("rms_norm", {0: X.double()}, "x is torch.float64: expected float32"),
    ("rms_norm", {1: W.int()}, "weight is torch.int32: expected float32"),
    ("rms_norm", {0: X[0, 0], 1: W[:1]}, r"shape \(\): expected"),
    ("rms_norm", {0: X[:, :0], 1: W[:0]}, r"shape \(2, 0\): expected .* H from 1"),
    ("rms_norm", {0: X.new_zeros(1, 16385), 1: X.new_zeros(16385)}, r"shape \(1, 16385\): expected .* to 16384"),
    ("rms_norm", {1: X.new_zeros(5)}, r"weight has shape \(5,\): expected .*\(4,\)"),
    ("rms_norm", {1: W[None]}, r"weight has shape \(1, 4\)"),
    ("rms_norm", {1: W.bfloat16()}, "weight is torch.bfloat16: expected x's torch.float32"),
    ("rms_norm", {0: X.to("meta")}, "x is on meta"),
    ("add_rms_norm", {0: X.double()}, "x is torch.float64: expected float32"),
    *(("add_rms_norm", {1: y}, "residual is .*: expected the same as x") for y in (X[:1], X.bfloat16(), X.T)),
    ("rope", {0: Q.double()}, "q is torch.float64: expected float32"),
    ("rope", {1: K.flatten(1)}, "k has shape .* expected 3 dimensions"),
    ("rope", {0: Q.to("meta")}, "q is on meta"),
    ("rope", {0: Q[..., :1], 1: K[..., :1]}, "q has heads of 1 elements: expected at least 2"),
    ("rope", {0: Q[..., :7], 1: K[..., :7]}, r"cos is torch.float32 \(3, 4\).*expected torch.float32 \(3, 3\)"),
    ("rope", {2: ANGLES[:, :0], 3: ANGLES[:, :0]}, r"cos is torch.float32 \(3, 0\)"),
    ("rope", {3: ANGLES[:, :2]}, r"sin is torch.float32 \(3, 2\).*as many in cos and sin"),
    ("rope", {1: K[:2]}, r"k is torch.float32 \(2, 2, 8\).*expected torch.float32 \(3, 2, 8\)"),
    ("rope", {1: K[..., :6]}, r"k is torch.float32 \(3, 2, 6\)"),
    ("rope", {1: K.bfloat16()}, "k is torch.bfloat16 .*expected torch.float32"),
    ("rope", {2: X.new_zeros(3, 8)}, r"cos is torch.float32 \(3, 8\).*expected torch.float32 \(3, 4\)"),
    ("rope", {3: ANGLES[:1]}, r"sin is torch.float32 \(1, 4\)"),
    ("rope", {3: ANGLES.bfloat16()}, "sin is torch.bfloat16"),
    ("rope", {2: ANGLES.clone().requires_grad_()}, r"cos requires a gradient.*pass cos.detach\(\)"),
    ("rope", {3: ANGLES.clone().requires_grad_()}, "sin requires a gradient"),
    ("qkv_rope", {0: Q}, "qkv has shape .* expected 2 dimensions"),
    ("qkv_rope", {0: QKV.double()}, "qkv is torch.float64: expected float32"),
    ("qkv_rope", {0: QKV[:, :63]}, "rows of 63 elements: expected a multiple of 8, for 4 heads of q and 2 each of k"),
    ("qkv_rope", {3: 0}, "rows of 64 elements: expected a multiple of 4, for 0 heads of q"),
    ("qkv_rope", {2: ANGLES[:, :2]}, r"sin is torch.float32 \(3, 2\).*as many in cos and sin"),
    ("qkv_rope", {2: ANGLES.clone().requires_grad_()}, "sin requires a gradient"),
    ("qkv_norm_rope", {0: QKV[:2]}, "cos is torch.float32"),
    ("qkv_norm_rope", {1: X[0]}, r"q_weight is torch.float32 \(4,\): expected .*\(8,\)"),
    ("qkv_norm_rope", {2: HEAD.bfloat16()}, "k_weight is torch.bfloat16 .*expected torch.float32"),
    ("qkv_norm_rope", {2: HEAD.to("meta")}, "k_weight is on meta"),
    ("qkv_norm_rope", {3: ANGLES[:1]}, "cos is torch.float32"),
    ("swiglu", {0: X.double()}, "float64: expected float32"),
    ("swiglu", {0: Q}, "expected 2 dimensions"),
    ("swiglu", {0: X.new_zeros(2, 5)}, "5 columns: expected an even number"),
    ("swiglu", {0: X.to("meta")}, "on meta"),
    ("geglu", {0: X.new_zeros(2, 5)}, "5 columns: expected an even number"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_an_operator_cannot_take_is_refused(name, changes, message):
    arguments = [changes.get(place, good) for place, good in enumerate(GOOD[name])]
    on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) and not x.is_meta else x for x in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(triton_ops, name)(*on_device)
