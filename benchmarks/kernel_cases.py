"""Launches of every operator over the shapes, layouts, dtypes and options that decide what is compiled.

    launches = note("swiglu")   # on meta tensors: no memory, no card
A new operator gets a function here; kernels_check fails for a kernel that none of them launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from ochat_kernels import swiglu
from ochat_kernels.launch import FLOATS, Launch, record
from torch import Tensor


class Model(NamedTuple):
    """The widths of a model, in the letters of the repository."""

    H: int
    F: int
    N: int
    K: int
    D: int
    V: int


MODELS = {
    "Llama-3-8B": Model(4096, 14336, 32, 8, 128, 128256),
    "Llama-2-7B": Model(4096, 11008, 32, 32, 128, 32000),
    "Llama-3.2-1B": Model(2048, 8192, 32, 8, 64, 128256),
    "Llama-3.2-3B": Model(3072, 8192, 24, 8, 128, 128256),
    "Llama-3-70B": Model(8192, 28672, 64, 8, 128, 128256),
    "SmolLM2-135M": Model(576, 1536, 9, 3, 64, 49152),
    "odd": Model(1031, 1031, 5, 3, 14, 1031),
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


def swiglu_cases() -> None:
    for dtype, F in product(FLOATS, [1, *widths("F")]):
        for gate_up, grad in zip(layouts(T, 2 * F, dtype=dtype), layouts(T, F, dtype=dtype), strict=True):
            swiglu.swiglu_fwd(gate_up)
            swiglu.swiglu_bwd(gate_up, grad)


CASES: dict[str, Callable[[], None]] = {"swiglu": swiglu_cases}
