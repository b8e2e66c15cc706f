"""Time the matrix products of a model's step, in bf16 and fp8, each as training calls it: rows of products.csv.

    PYTHONPATH=.:kernels python -m benchmarks.products --out DIR [--device cpu --quick]
forward: x W^T. input: dy W. weight: dy^T x, added to an fp32 gradient. fp8 products have a scale a row.
Letters as in cases.py; R rows of the head at a time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from ochat_kernels.fp8 import scaled_product
from ochat_kernels.reference_fp8 import quantize_rows
from torch import Tensor

from benchmarks import command_line, csv_file, smoke, timing
from benchmarks.cases import MODELS, Model
from benchmarks.timing import Ceilings

T, R = 16384, 8192
TINY = Model("tiny", H=64, F=96, N=4, K=2, D=16, V=512)
COLUMNS = [
    *(
        "date",
        "commit",
        "device",
        "torch",
        "triton",
        "driver",
        "model",
        "product",
        "pass",
        "dtype",
        "rows",
        "in",
        "out",
    ),
    *("status", "note", "repeats", "median_ms", "p20_ms", "p80_ms", "tflop_per_s", "ceiling_tflop_per_s", "of_ceiling"),
]
REPEATS = 10


class Product(NamedTuple):
    """One weight (out, in), and the rows that meet it at a time."""

    name: str
    size_in: int
    size_out: int
    rows: int


def products_of(m: Model, rows: int, head_rows: int) -> list[Product]:
    return [
        Product("qkv", m.H, (m.N + 2 * m.K) * m.D, rows),
        Product("out", m.N * m.D, m.H, rows),
        Product("gate_up", m.H, 2 * m.F, rows),
        Product("down", m.F, m.H, rows),
        Product("head", m.H, m.V, head_rows),
    ]


def calls(product: Product, device: torch.device) -> dict[tuple[str, str], Callable[[], Any]]:
    """{(pass, dtype): the call}; the head has no fp8."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, dy = draw(product.rows, product.size_in), draw(product.rows, product.size_out)
    weight, gradient = draw(product.size_out, product.size_in), torch.zeros(product.size_out, product.size_in)
    gradient = gradient.to(device)
    made = {
        ("forward", "bf16"): lambda: x @ weight.t(),
        ("input", "bf16"): lambda: dy @ weight,
        ("weight", "bf16"): lambda: add_product(gradient, dy, x),
    }
    if product.name != "head":
        made |= {
            ("forward", "fp8"): fp8_product(x, weight),
            ("input", "fp8"): fp8_product(dy, weight.t().contiguous()),
        }
    return made


def add_product(gradient: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """dy^T x of bf16 into fp32 in one product; a CPU has none."""
    if gradient.is_cuda:
        return torch.addmm(gradient, dy.t(), x, out_dtype=torch.float32, out=gradient)
    return gradient.add_(dy.t() @ x)


def fp8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """(rows, in) times (out, in)^T of fp8 values, which are rounded beforehand: the operators before write them."""
    rows = (*quantize_rows(x), *quantize_rows(weight))
    return lambda: scaled_product(*rows)


def measure(product: Product, device: torch.device, ceilings: Ceilings, quick: bool) -> Iterator[dict[str, Any]]:
    """A row of each call; what cannot run here says why."""
    ready, names = {}, {"product": product.name, "rows": product.rows, "in": product.size_in, "out": product.size_out}
    for (which, dtype), call in calls(product, device).items():
        try:
            call()
            timing.synchronize(device)
            ready[which, dtype] = call
        except Exception as problem:
            yield names | {"pass": which, "dtype": dtype, "status": "failed", "note": timing.reason(problem)}
    flops = 2 * product.rows * product.size_in * product.size_out
    times = timing.interleave({f"{a} {b}": call for (a, b), call in ready.items()}, 2 if quick else REPEATS, device)
    for which, dtype in ready:
        taken = times[f"{which} {dtype}"]
        median_ms, p20_ms, p80_ms = csv_file.spread(taken).values()
        ceiling = ceilings.tflop_per_s * (2 if dtype == "fp8" else 1)
        rate = flops / median_ms / 1e9
        yield names | {
            "pass": which, "dtype": dtype, "status": "ok", "repeats": len(taken), "median_ms": median_ms,
            "p20_ms": p20_ms, "p80_ms": p80_ms, "tflop_per_s": rate, "ceiling_tflop_per_s": ceiling,
            "of_ceiling": rate / ceiling,
        }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.products", "times the products of a step", "products.csv")
    options = command_line.parse(parser, arguments, "real shapes take minutes each")
    device, deadline = torch.device(options.device), time.monotonic() + options.seconds
    ceilings = smoke.read(options.out, device) or timing.measure_ceilings(device, quick=options.quick)
    rows = csv_file.CsvFile(options.out / "products.csv", COLUMNS)
    stamp, is_good = csv_file.stamp(device, options.commit), True
    models = [TINY] if options.quick else [MODELS["Llama-3-8B"], MODELS["Llama-3.2-1B"]]
    for model in models:
        for product in products_of(model, *((64, 32) if options.quick else (T, R))):
            if time.monotonic() > deadline:
                break
            for row in measure(product, device, ceilings, options.quick):
                rows.add(stamp | {"model": model.name} | row)
                print(model.name, *(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()))
                is_good &= row["status"] == "ok" or row["dtype"] == "fp8"
            timing.free(device)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
