"""Launches of every operator over the shapes, layouts, dtypes and options that decide what is compiled.

    launches = note("glu")   # on meta tensors: no memory, no GPU
A new operator gets a function here: kernels_check fails for a kernel that none of them launches. A compilation takes a
quarter of a second of a core, so bf16, which models train in, gets the widths of every model; layouts come at one width
and an odd one, and the other dtypes where a thread needs the most registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from ochat_kernels import (
    adamw,
    adamw_with_norm,
    fp8,
    glu,
    lce_kernels,
    linear_cross_entropy,
    qkv_norm_rope,
    rms_norm,
    rope,
)
from ochat_kernels.dynamic_weights import KINDS
from ochat_kernels.launch import FLOATS, Launch, record
from ochat_kernels.reference_fp8 import MULTIPLE
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import Model

MODELS = {  # what is measured, a large and a small model, and one of odd widths
    **cases.MODELS,
    "Llama-3-70B": Model("Llama-3-70B", H=8192, F=28672, N=64, K=8, D=128, V=128256),
    "SmolLM2-135M": Model("SmolLM2-135M", H=576, F=1536, N=9, K=3, D=64, V=49152),
    "odd": Model("odd", H=1031, F=1031, N=5, K=3, D=14, V=1031),
}
T = 16384


def note(operator: str) -> list[Launch]:
    """What the operator's launchers would start over all its cases."""
    with record() as launches:
        CASES[operator]()
    return launches


def widths(letter: str) -> list[int]:
    """The values that the models give to a letter, each once."""
    return sorted({getattr(model, letter) for model in MODELS.values()})


def layouts(*shape: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Memory that differs in what a compiler may assume: dense; rows apart by an odd and by an even stride; a view
    whose address is no multiple of 16 bytes."""
    yield empty(*shape, dtype=dtype)
    for padding in (3, 16):
        yield empty(*shape[:-1], shape[-1] + padding, dtype=dtype)[..., : shape[-1]]
    yield empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def representative(model: Model) -> list[Launch]:
    """Every kernel as the model launches it in bf16, its optimizer over fp32 parameters with bf16 copies."""
    bf16, fp32 = torch.bfloat16, torch.float32
    H, F, N, K, D = model.H, model.F, model.N, model.K, model.D
    x, gate_up, param = empty(T, H, dtype=bf16), empty(T, 2 * F, dtype=bf16), empty(2 * F, H, dtype=fp32)
    with record() as launches:
        glu.glu_fwd(gate_up, False)
        glu.glu_fp8_fwd(gate_up, False)
        glu.glu_bwd(gate_up, empty(T, F, dtype=bf16), False)
        for transform in ("", linear_cross_entropy._name(_unchanged)):
            _head(bf16, model.V, 0, 0.0, transform, wanted=True)
        lce_kernels.lce_scale(x, empty(dtype=fp32), bf16)
        angles = empty(T, D // 2, dtype=fp32)
        rope.qkv_rope_fwd(empty(T, (N + 2 * K) * D, dtype=bf16), angles, angles, N, K)
        _qkv_norm_rope(empty(T, (N + 2 * K) * D, dtype=bf16), N, K, D, 0.0)
        weight, rstd = empty(H, dtype=bf16), empty(T, dtype=fp32)
        rms_norm.add_rms_norm_fwd(x, x, weight, 1e-5, 0.0)
        rms_norm.rms_norm_bwd(x, x, x, weight, rstd, 0.0, True)
        fp8.rows_fwd(x, None)
        fp8.transposed_fwd(empty(2 * F, H, dtype=bf16), empty(2 * F, 1, dtype=fp32))
        state, copy = empty(2 * F, H, dtype=fp32), empty(2 * F, H, dtype=bf16)
        numbers = {"lr": 1e-4, "beta_1": 0.9, "beta_2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
        lists = [param], [param], [state], [state], [copy], empty(dtype=fp32), None
        adamw.adamw_step(*lists, **numbers, seed=0, ids=[0], offsets=[0])
        numbers |= {"skipped": 0, "key": 1, "offset": 0}
        adamw_with_norm.adamw_with_norm_step(param, param, state, state, copy, **numbers)
    return launches


def glu_cases() -> None:
    fp32, bf16, fp16 = FLOATS
    pairs = [(empty(T, 2 * F, dtype=bf16), empty(T, F, dtype=bf16)) for F in (1, *widths("F"))]
    for F in (14336, 1031):
        pairs += zip(layouts(T, 2 * F, dtype=bf16), layouts(T, F, dtype=bf16), strict=True)
        pairs += [(empty(T, 2 * F, dtype=dtype), empty(T, F, dtype=dtype)) for dtype in (fp32, fp16)]
    for (gate_up, grad), is_gelu in product(pairs, (False, True)):
        glu.glu_fwd(gate_up, is_gelu)
        glu.glu_fp8_fwd(gate_up, is_gelu)
        glu.glu_bwd(gate_up, grad, is_gelu)


def linear_cross_entropy_cases() -> None:
    """Vocabularies of the models and odd ones: the larger, the more warps a row has, and the fewer registers a thread
    may take."""
    fp32, bf16, fp16 = FLOATS
    transforms = ("", linear_cross_entropy._name(_unchanged))
    heads = [(bf16, V) for V in (*widths("V"), 32002, 128257)] + [(fp32, 128256), (fp16, 128256)]
    for (dtype, V), softcap in product(heads, (0.0, 30.0)):
        _head(dtype, V, 0, softcap, "", wanted=False)
        for transform in transforms:
            _head(dtype, V, 0, softcap, transform, wanted=True)
    _head(bf16, 128257, 1001, 30.0, "", wanted=True)  # chunks that begin where no address is a multiple of 16
    for kind, (dtype, V, softcap) in product(KINDS, ((bf16, 128256, 0.0), (bf16, 128257, 30.0), (fp32, 128256, 30.0))):
        _head(dtype, V, 0, softcap, "", wanted=True, kind=kind)
    for dtype, num_elements in product(FLOATS, (T * 4096, 1031 * 63)):
        for source in {dtype, torch.float32}:
            lce_kernels.lce_scale(empty(num_elements, dtype=source), empty(dtype=torch.float32), dtype)


def _head(
    dtype: torch.dtype, V: int, chunk_rows: int, softcap: float, transform: str, wanted: bool, kind: str = ""
) -> None:
    hidden, weight = empty(T, 64, dtype=dtype), empty(V, 64, dtype=dtype)
    labels, rows, loss_weights = (empty(T, dtype=each) for each in (torch.int64, torch.int64, torch.float32))
    options = chunk_rows, softcap, transform, kind, 1.0, 3.0, wanted, wanted
    linear_cross_entropy.lce_fwd(hidden, weight, labels, loss_weights, rows, *options)


def _unchanged(nll: Tensor, weights: Tensor) -> Tensor:
    return weights


def rope_cases() -> None:
    """Heads of every model, and of three that turn a part of each (Phi-4-mini's is the first)."""
    fp32, bf16, fp16 = FLOATS
    heads = [(model.N, model.K, model.D, model.D, bf16) for model in MODELS.values()]
    heads += [(N, K, D, d, bf16) for N, K, D, d in ((24, 8, 128, 96), (32, 32, 80, 32), (16, 16, 256, 64))]
    heads += [(9, 3, 64, 64, fp32), (9, 3, 64, 64, fp16)]
    for N, K, D, d, dtype in heads:
        q, k, angles = empty(T, N, D, dtype=dtype), empty(T, K, D, dtype=dtype), empty(T, d // 2, dtype=fp32)
        rope.rope_bwd(q, k, angles, angles)
        rope.qkv_rope_bwd(q, k, k, angles, angles)
        _rope(empty(T, (N + 2 * K) * D, dtype=dtype), angles, N, K)
    for N, K, D in ((32, 8, 128), (5, 3, 14)):
        angles = empty(T, D // 2, dtype=fp32)
        for packed in layouts(T, (N + 2 * K) * D, dtype=bf16):
            _rope(packed, angles, N, K)
        q, k, _ = rope.heads_of(empty(T, (N + 2 * K) * D, dtype=bf16), N, K)
        rope.rope_fwd(q[1:], k[1:], angles[1:], angles[1:])


def _rope(packed: Tensor, angles: Tensor, N: int, K: int) -> None:
    rope.qkv_rope_fwd(packed, angles, angles, N, K)
    q, k, _ = rope.heads_of(packed, N, K)
    rope.rope_fwd(q, k, angles, angles)


def qkv_norm_rope_cases() -> None:
    """Heads of Qwen3 and SmolLM2 without an offset, of Gemma 3 (1B, 4B) with one, of Qwen3-Next, a quarter of which
    turns, and of odd sizes; then the layouts and dtypes of one size. Triton spills up to 16 bytes for odd sizes of
    which half turns or less; no model has these."""
    fp32, bf16, fp16 = FLOATS
    heads = [(32, 8, 128, 128, 0.0), (4, 1, 256, 256, 1.0), (8, 4, 256, 256, 1.0), (9, 3, 64, 64, 0.0)]
    heads += [(16, 2, 256, 64, 1.0), (5, 3, 14, 14, 0.0), (5, 3, 15, 10, 1.0)]
    for N, K, D, d, offset in heads:
        _qkv_norm_rope(empty(T, (N + 2 * K) * D, dtype=bf16), N, K, d, offset, frozen=True)
    for N, K, D, d, offset in ((4, 1, 256, 256, 1.0), (5, 3, 15, 10, 1.0)):
        _qkv_norm_rope(empty(T, (N + 2 * K) * D, dtype=fp32), N, K, d, offset)
    N, K, D = 32, 8, 128
    for packed in [*layouts(T, (N + 2 * K) * D, dtype=bf16), empty(T, (N + 2 * K) * D, dtype=fp16)]:
        _qkv_norm_rope(packed, N, K, D, 0.0)
    _qkv_norm_rope(empty(T, (N + 2 * K) * D, dtype=bf16), N, K, D, 0.0, dtype=fp32)


def _qkv_norm_rope(
    packed: Tensor, N: int, K: int, d: int, offset: float, dtype: torch.dtype | None = None, frozen: bool = False
) -> None:
    """`dtype`: of the weights, else that of the product; `frozen`: also without their gradients, which takes fewer
    registers."""
    gradients = rope.new_heads(packed, N, K)
    weight = empty(gradients[0].shape[2], dtype=dtype or packed.dtype)
    angles, rstd = empty(T, d // 2, dtype=torch.float32), empty(T, N + K, dtype=torch.float32)
    inputs = (packed, weight, weight, angles, angles)
    qkv_norm_rope.qkv_norm_rope_fwd(*inputs, N, K, 1e-6, offset)
    for need_weights in (True, False) if frozen else (True,):
        qkv_norm_rope.qkv_norm_rope_bwd(*gradients, *inputs, rstd, offset, need_weights)


def rms_norm_cases() -> None:
    """Widths of the models, of their heads and of the longest row, then the blocks and the odd widths between."""
    fp32, bf16, fp16 = FLOATS
    for H in {*widths("H"), *widths("D"), 1, 256, 16383, 16384}:
        _norm(empty(T, H, dtype=bf16), empty(H, dtype=bf16), frozen=True)
    for H in (4096, 16384):
        _norm(empty(T, H, dtype=bf16), empty(H, dtype=fp32))
    for dtype, H in ((fp32, 1031), (fp32, 8192), (fp32, 16383), (fp32, 16384), (fp16, 16384)):  # those of 32 warps
        _norm(empty(T, H, dtype=dtype), empty(H, dtype=dtype))
    for x in layouts(T, 4096, dtype=bf16):
        _norm(x, empty(4096, dtype=bf16))
    for H in (256, 1152, 2304, 3584, 5376):  # Gemma's heads, and a width for each size of tile
        _norm(empty(T, H, dtype=bf16), empty(H, dtype=bf16), offset=1.0, frozen=True)


def _norm(x: Tensor, weight: Tensor, offset: float = 0.0, frozen: bool = False) -> None:
    """`frozen`: also without the weight's gradient, which takes fewer registers."""
    rms_norm.rms_norm_fwd(x, weight, 1e-5, offset)
    rms_norm.add_rms_norm_fwd(x, x, weight, 1e-5, offset)
    if x.shape[1] % MULTIPLE == 0:
        rms_norm.rms_norm_fp8_fwd(x, weight, 1e-5, offset)
        rms_norm.add_rms_norm_fp8_fwd(x, x, weight, 1e-5, offset)
    rstd = empty(x.shape[0], dtype=torch.float32)
    for grad_sum, need_weight in product((None, x), (True, False) if frozen else (True,)):
        rms_norm.rms_norm_bwd(x, grad_sum, x, weight, rstd, offset, need_weight)


def adamw_cases() -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    for dtype, grad, state in product((fp32, bf16), repeat=3):
        for grad_scale in (None, empty(dtype=fp32)):
            kinds = (dtype, grad, state, state)
            params, grads, *moments = ([empty(size, dtype=kind) for size in (4096, 1031)] for kind in kinds)
            numbers = {"lr": 1e-4, "beta_1": 0.9, "beta_2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
            numbers |= {"seed": 0, "ids": [0, 1], "offsets": [0, 0]}
            copies = [empty(size, dtype=bf16) for size in (4096, 1031)] if dtype == fp32 else []
            for written in ([], copies) if copies else ([],):
                adamw.adamw_step(params, grads, moments[0], moments[1], written, grad_scale, grad_scale, **numbers)


def adamw_with_norm_cases() -> None:
    """Sizes that allow wide accesses and that do not; a whole gradient at an odd address."""
    fp32, bf16 = torch.float32, torch.bfloat16
    numbers = {"lr": 1e-4, "beta_1": 0.9, "beta_2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3, "skipped": 1}
    numbers |= {"key": 1, "offset": 0}
    for dtype, grad, state in product((fp32, bf16), repeat=3):
        for shape in ((4096, 4096), (4095,)):
            for copy in (None, empty(*shape, dtype=bf16)) if dtype == fp32 else (None,):
                param, gradient, *moments = (empty(*shape, dtype=kind) for kind in (dtype, grad, state, state))
                adamw_with_norm.adamw_with_norm_step(param, gradient, moments[0], moments[1], copy, **numbers)


def fp8_cases() -> None:
    """What linears quantise: their inputs, weights and gradients, bf16 or fp32, and rows that nothing is known of."""
    fp32, bf16, fp16 = FLOATS
    inputs = [empty(T, H, dtype=bf16) for H in (*widths("H"), *widths("F"), *(2 * F for F in widths("F")), 1)]
    inputs += [*layouts(T, 4096, dtype=bf16), *layouts(T, 4097, dtype=bf16)]
    inputs += [empty(T, 4096, dtype=fp32), empty(T, 4097, dtype=fp32), empty(T, 4096, dtype=fp16)]
    for x in inputs:
        fp8.rows_fwd(x, None)
        fp8.rows_fwd(x, empty(x.shape[1], 1, dtype=fp32))
    weights = [*layouts(4096, 14336, dtype=bf16), *layouts(1031, 1033, dtype=bf16)]
    weights += [empty(*shape, dtype=dtype) for shape, dtype in product(((4096, 14336), (1031, 1033)), (fp32, fp16))]
    for weight in weights:
        fp8.transposed_fwd(weight, empty(weight.shape[0], 1, dtype=fp32))


CASES: dict[str, Callable[[], None]] = {
    "glu": glu_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "rope": rope_cases,
    "qkv_norm_rope": qkv_norm_rope_cases,
    "rms_norm": rms_norm_cases,
    "adamw": adamw_cases,
    "adamw_with_norm": adamw_with_norm_cases,
    "fp8": fp8_cases,
}
