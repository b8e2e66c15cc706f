"""One comparison for every operator: its outputs and gradients against the definition's, truth in float64."""

from collections.abc import Callable
from typing import Any

import torch
from ochat_kernels import Dynamic, triton_ops
from torch import Tensor

from tests.numerics import assert_close

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATOL = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}  # for values of order 1


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def outputs_and_gradients(
    function: Callable[..., Any], inputs: list[Tensor], wanted: list[bool], dtype: torch.dtype
) -> list[Tensor]:
    """The function's floating-point outputs, then the gradients of the `wanted` inputs under fixed random upstream
    gradients; inputs are copied in `dtype`, with the strides that they have."""
    leaves = [_copy(x, dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [random(*y.shape, dtype=y.dtype, seed=i + 1) for i, y in enumerate(outputs)]
    narrow = [x.dtype for x in inputs if x.is_floating_point()][0]
    upstream = [u.to(narrow).to(dtype) for u in upstream]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], upstream)
    return [y.detach() for y in outputs] + list(gradients)


def assert_op(
    op: Callable[..., Any], definition: Callable[..., Any], inputs: list[Tensor], wanted: list[bool] | None = None
) -> None:
    """Every output and every wanted gradient of `op` obeys the accuracy rule, and has the definition's dtype."""
    wanted = wanted or [x.is_floating_point() for x in inputs]
    dtype = inputs[0].dtype
    truth = outputs_and_gradients(definition, inputs, wanted, torch.float64)
    expected = outputs_and_gradients(definition, inputs, wanted, dtype)
    for got, reference, true in zip(outputs_and_gradients(op, inputs, wanted, dtype), expected, truth, strict=True):
        assert got.dtype == reference.dtype
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        assert_close(got, reference, true, ATOL[dtype] * scale)


def operators(T: int, H: int, dtype: torch.dtype) -> dict[str, tuple[Callable, list[Tensor]]]:
    """A call of every differentiable kernel: name -> function of its leaves, the leaves; some rows carry no loss."""
    x, residual, weight = (random(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(T, H), (T, H), (H,)]))
    qkv = random(T, 7, H, dtype=dtype, seed=3)  # 3 heads of q, 2 of k and v: views of one product
    cos, sin = (f(random(T, H // 2, seed=4)) for f in (torch.cos, torch.sin))
    head = random(5 * H, H, dtype=dtype, seed=5, scale=H**-0.5)
    labels = torch.arange(T, device=DEVICE) % (5 * H)
    rows = torch.arange(0, T, 2, device=DEVICE)
    weights = torch.zeros(T, device=DEVICE).index_fill_(0, rows, 0.5)

    def loss(hidden: Tensor, head: Tensor, **options: Any) -> Tensor:
        return triton_ops.linear_cross_entropy(hidden, head, labels, weights, rows=rows, **options).loss_sum

    return {
        "rms_norm": (lambda x, w: triton_ops.rms_norm(x, w, 1e-5), [x, weight]),
        "add_rms_norm": (lambda x, r, w: triton_ops.add_rms_norm(x, r, w, 1e-5, 1.0), [x, residual, weight]),
        "rope": (lambda qkv: triton_ops.rope(*qkv.split((3, 2, 2), dim=1)[:2], cos, sin), [qkv]),
        "qkv_rope": (lambda qkv: triton_ops.qkv_rope(qkv.flatten(1), cos, sin, 3, 2), [qkv]),
        "qkv_norm_rope": (
            lambda qkv, a, b: triton_ops.qkv_norm_rope(qkv.flatten(1), a, b, cos, sin, 3, 2, 1e-5, 1.0),
            [qkv, weight, random(H, dtype=dtype, seed=7)],
        ),
        "swiglu": (triton_ops.swiglu, [random(T, 2 * H, dtype=dtype, seed=6)]),
        "geglu": (triton_ops.geglu, [random(T, 2 * H, dtype=dtype, seed=6)]),
        "linear_cross_entropy": (loss, [x, head]),
        "linear_cross_entropy, transform": (lambda h, w: loss(h, w, weight_transform=likelihood_weight), [x, head]),
        "linear_cross_entropy, dynamic": (lambda h, w: loss(h, w, dynamic=Dynamic("eaft")), [x, head]),
    }


def loss_inputs(T: int, H: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head weight, labels with some missing, weights of both signs with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    hidden = random(T, H, dtype=dtype, seed=seed)
    weight = random(V, H, dtype=dtype, seed=seed + 1, scale=H**-0.5)
    labels = torch.randint(V, (T,), generator=generator)
    labels[torch.rand(T, generator=generator) < 0.2] = -100
    weights = torch.randn(T, generator=generator)
    weights[torch.rand(T, generator=generator) < 0.2] = 0
    return hidden, weight, labels.to(DEVICE), weights.to(DEVICE)


def likelihood_weight(nll: Tensor, weights: Tensor) -> Tensor:
    """A transform of loss weights, by the model's own likelihood."""
    return weights * torch.exp(-nll)


def strided_rows(x: Tensor, padding: int = 3) -> Tensor:
    """The same values as columns of a wider matrix: rows that do not follow one another in memory."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + padding), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.empty_strided(
        x.shape, x.stride(), dtype=dtype if x.is_floating_point() else x.dtype, device=x.device
    )
    return target.copy_(x.detach())
