"""e4m3 rows: kernels against the definition, bit for bit; products against what they were quantised from."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ochat_kernels import fp8, reference, reference_fp8, triton_ops
from torch import Tensor

from tests.kernels.harness import DEVICE, outputs_and_gradients, random, strided_rows
from tests.numerics import relative_error

HAS_PRODUCT = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
needs_product = pytest.mark.skipif(not HAS_PRODUCT, reason="the card has no e4m3 products")
ERROR = 0.04  # of a product of normal numbers: each operand is rounded to 3 bits, which is 0.026
CHECKED = ("test_schema", "test_autograd_registration", "test_faketensor")  # the others sum e4m3, which torch does not
BF16_ERROR = 2.6e-3  # of one rounding to bf16, relative to the whole product


def assert_same_bits(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape and g.is_contiguous()
        bits = torch.uint8 if g.dtype == fp8.FP8 else g.dtype
        torch.testing.assert_close(g.view(bits), e.view(bits), rtol=0, atol=0)


def dequantized(x8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return x8.to(dtype) * scale.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lay_out", [torch.clone, strided_rows])
@pytest.mark.parametrize("shape", [(1, 1), (40, 7), (5, 130), (2, 4096), (3, 9000), (0, 12)])
def test_rows_have_the_bits_of_the_definition(shape, lay_out, dtype):
    sizes = torch.logspace(-3, 3, shape[0], device=DEVICE)[:, None]
    x = lay_out((random(*shape, scale=3.0) * sizes).to(dtype))
    for factors in (None, random(shape[1], 1, seed=1).exp()):
        assert_same_bits(fp8.quantize_rows(x, factors), reference.quantize_rows(x, factors))
    scale = reference.quantize_rows(x)[1]
    transposed = fp8.quantize_transposed(x, scale)
    assert_same_bits((transposed,), (reference.quantize_transposed(x, scale),))
    assert_same_bits((transposed,), (reference.quantize_rows(x)[0].t().contiguous(),))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_finite_row(numbers):
    x = torch.tensor([numbers], device=DEVICE)
    x8, scale = fp8.quantize_rows(x)
    assert_same_bits((x8, scale), reference.quantize_rows(x))
    step = (x.double() / 16).abs().clamp_min(scale.double() * 2**-10)  # half a unit of the last place
    assert ((dequantized(x8, scale) - x.double()).abs() <= step * (1 + 1e-6)).all()


def test_every_number_of_e4m3_is_kept():
    x = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(fp8.FP8).float()
    x = x[x.isfinite()][None]
    x8, scale = fp8.quantize_rows(x)
    assert scale.item() == 1.0
    torch.testing.assert_close(x8.float(), x, rtol=0, atol=0)


def test_rows_of_zeros_and_of_the_smallest_numbers():
    x = torch.zeros(3, 32, device=DEVICE)
    x[1] = 1e-36
    x[2] = 3e38
    x8, scale = fp8.quantize_rows(x)
    assert not x8[0].float().any()
    assert torch.isfinite(scale).all() and torch.isfinite(x8.float()).all()
    torch.testing.assert_close(dequantized(x8, scale)[2], x[2].double(), rtol=1e-6, atol=0)


@needs_product
def test_what_is_not_finite_stays_in_its_row():
    x, weight = random(4, 32), random(16, 32, seed=1)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    for ops in (triton_ops, reference):
        y = ops.scaled_product(*ops.quantize_rows(x), *ops.quantize_rows(weight))
        assert y.isfinite().all(1).tolist() == [True, False, False, True]
        assert not y[[1, 2]].isfinite().any()


@needs_product
@pytest.mark.parametrize(("T", "n", "m"), [(1, 16, 16), (7, 64, 48), (33, 576, 96), (0, 16, 32)])
def test_a_product_is_that_of_the_dequantized_numbers(T, n, m):
    a, b = fp8.quantize_rows(random(T, n)), fp8.quantize_rows(random(m, n, seed=1, scale=0.1))
    bias = random(m, seed=2, dtype=torch.bfloat16)
    exact = dequantized(*a) @ dequantized(*b).t()
    for ops in (triton_ops, reference):
        for truth, y in (
            (exact, ops.scaled_product(*a, *b)),
            (exact + bias.double(), ops.scaled_product(*a, *b, bias)),
            (dequantized(*a) @ b[0].double().t(), ops.scaled_product(*a, b[0])),
        ):
            assert y.dtype == torch.bfloat16 and y.shape == (T, m)
            assert not T or relative_error(y, truth) < BF16_ERROR


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a card sums in another order")
@pytest.mark.parametrize(("T", "n", "m"), [(7, 64, 48), (33, 65, 51)])
def test_torch_multiplies_on_a_cpu_as_the_definition_does(T, n, m):
    """In fp32, before the one rounding, to the last bits of a sum; torch takes any size there."""
    (a8, a_scale), (b8, b_scale) = fp8.quantize_rows(random(T, n)), fp8.quantize_rows(random(m, n, seed=1))
    wide = torch._scaled_mm(a8, b8.t(), a_scale, b_scale.t(), out_dtype=torch.float32)
    plain = dequantized(a8, a_scale, torch.float32) @ dequantized(b8, b_scale, torch.float32).t()
    torch.testing.assert_close(wide, plain, rtol=0, atol=2e-6 * plain.abs().max().item())


@needs_product
@pytest.mark.parametrize("ops", [triton_ops, reference])
def test_products_of_a_linear_and_of_its_gradient(ops):
    """As near to the exact ones as 3 bits allow, whatever the sizes of gradients and of the weight's rows."""
    x, dy = random(64, 96, dtype=torch.bfloat16), random(64, 160, dtype=torch.bfloat16, seed=1, scale=1e-9)
    dy *= torch.logspace(-3, 3, 64, device=DEVICE, dtype=torch.bfloat16)[:, None]
    weight = random(160, 96, seed=2) * torch.logspace(-2, 1, 160, device=DEVICE)[:, None]
    w8, scale = ops.quantize_rows(weight)
    y = ops.scaled_product(*ops.quantize_rows(x), w8, scale)
    dx = ops.scaled_product(*ops.quantize_rows(dy, scale), ops.quantize_transposed(weight, scale))
    for got, truth in ((y, x.double() @ weight.double().t()), (dx, dy.double() @ weight.double())):
        for row, true in zip(got, truth, strict=True):
            assert relative_error(row, true) < 3 * ERROR
        assert relative_error(got, truth) < ERROR
    assert relative_error(dx, dequantized(*ops.quantize_rows(dy)) @ dequantized(w8, scale)) < ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 96), (2, 5000), (0, 16)])
def test_norms_and_activations_quantise_what_they_give(shape, dtype):
    x, residual, wide = (random(*shape, dtype=dtype, seed=i) for i in range(3))
    weight, gate_up = 1 + random(shape[1], dtype=dtype, seed=3), torch.cat((wide, residual), 1)
    y, y8, scale = triton_ops.rms_norm_fp8(x, weight, 1e-5, 1.0)
    assert_same_bits((y, y8, scale), (triton_ops.rms_norm(x, weight, 1e-5, 1.0), *reference.quantize_rows(y)))
    y, y8, scale, total = triton_ops.add_rms_norm_fp8(x, residual, weight, 1e-5)
    assert_same_bits(
        (y, total, y8, scale), (*triton_ops.add_rms_norm(x, residual, weight, 1e-5), *reference.quantize_rows(y))
    )
    for name in ("swiglu", "geglu"):
        y, y8, scale = getattr(triton_ops, f"{name}_fp8")(gate_up)
        assert_same_bits((y, y8, scale), (getattr(triton_ops, name)(gate_up), *reference.quantize_rows(y)))


@pytest.mark.parametrize("ops", [triton_ops, reference])
def test_their_gradients_are_those_without_fp8(ops):
    x, residual = random(6, 32, dtype=torch.bfloat16), random(6, 32, dtype=torch.bfloat16, seed=1)
    weight = 1 + random(32, dtype=torch.bfloat16, seed=2)
    kept = {"rms_norm": (0,), "add_rms_norm": (0, 3), "swiglu": (0,), "geglu": (0,)}
    inputs = {"rms_norm": [x, weight], "add_rms_norm": [x, residual, weight], "swiglu": [x], "geglu": [x]}
    for name, leaves in inputs.items():
        options = {"eps": 1e-5} if "norm" in name else {}
        plain, quantising = (partial(getattr(ops, each), **options) for each in (name, f"{name}_fp8"))

        def values(*leaves, quantising=quantising, name=name):
            outputs = quantising(*leaves)
            assert [y.requires_grad for y in outputs] == [place in kept[name] for place in range(len(outputs))]
            return tuple(outputs[place] for place in kept[name])

        results = [outputs_and_gradients(f, leaves, [True] * len(leaves), x.dtype) for f in (values, plain)]
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_they_register():
    x, weight = random(6, 32).requires_grad_(), random(32, seed=1).requires_grad_()
    scale = reference_fp8.quantize_rows(x.detach())[1]
    for name, arguments in {
        "quantize_rows": (x.detach(), None),
        "quantize_transposed": (x.detach(), scale),
        "rms_norm_fp8": (x, weight, 1e-5, 0.0),
        "add_rms_norm_fp8": (x, random(6, 32).requires_grad_(), weight, 1e-5, 0.0),
        "glu_fp8": (x, False),
    }.items():
        torch.library.opcheck(getattr(torch.ops.ochat_kernels, name).default, arguments, test_utils=CHECKED)


def test_a_compiler_sees_their_gradients():
    leaves = [random(6, 32, dtype=torch.bfloat16), 1 + random(32, dtype=torch.bfloat16, seed=2)]

    def product(x, weight):
        x8, scale = triton_ops.swiglu_fp8(triton_ops.rms_norm_fp8(x, weight, 1e-5)[0])[1:]
        y = triton_ops.swiglu_fp8(triton_ops.rms_norm_fp8(x, weight, 1e-5)[0])[0]
        return y + triton_ops.scaled_product(x8, scale, x8, scale)[:, :1]

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    results = [outputs_and_gradients(f, leaves, [True, True], torch.bfloat16) for f in (compiled, product)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("quantize_rows", (X.double(),), "x is torch.float64: expected float32"),
        ("quantize_rows", (X[0],), "expected 2 dimensions"),
        ("quantize_rows", (X, X[0]), r"factors is torch.float32 \(4,\): expected float32 \(4, 1\)"),
        ("quantize_rows", (X.to("meta"),), "x is on meta"),
        ("quantize_transposed", (X, X[:, :1].double()), r"scale is torch.float64 .*a number for each row of weight"),
        ("rms_norm_fp8", (X[None], X[0], 1e-5), "expected 2 dimensions"),
        ("add_rms_norm_fp8", (X, X[:1], X[0], 1e-5), "residual is .*: expected the same as x"),
        ("swiglu_fp8", (X[:, :3],), "3 columns: expected an even number"),
    ],
)
def test_what_they_cannot_take_is_refused(name, arguments, message):
    on_device = [x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for x in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(triton_ops, name)(*on_device)
