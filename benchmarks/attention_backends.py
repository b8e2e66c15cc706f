"""Implementations of attention over packed documents: the product's backends, and candidates.

    for each in BACKENDS: out = each.load()({"q": q, "k": k, "v": v, "documents": documents, "window": None})
If an import or a call fails, the table shows the reason. Letters as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.attention
from torch import Tensor

from benchmarks.attention import Documents, with_empty
from benchmarks.implementations import Arguments, Function, Implementation
from ochat.model.attention import backends as product
from ochat.model.attention.packed import PackedAttention
from ochat.model.attention.sdpa import Scores

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, N, D), k and v (T, K, D) -> (T, N, D), causal
Prepare = Callable[[Documents, int | None], Attend]  # window: a token sees itself and window - 1 tokens before it


def backend(name: str, prepare: Prepare, flash: str | None = None, is_compiled: bool = False) -> Implementation:
    """An implementation of attention. `prepare` makes, once for all layers, what a batch needs; `flash`: the
    FlashAttention that torch uses inside, by its name in torch's registry."""

    def load() -> Function:
        prepared: dict[tuple, Attend] = {}

        def attend(a: Arguments) -> Tensor:
            key = id(a["documents"]), a["window"]
            if key not in prepared:
                prepared[key] = prepare(a["documents"], a["window"])
            return prepared[key](a["q"], a["k"], a["v"])

        return attend

    active = nullcontext if flash is None else partial(_activated, flash)
    return Implementation(name, load, is_compiled=is_compiled, active=active)


@contextmanager
def _activated(flash: str) -> Iterator[None]:
    """Torch's choice of FlashAttention holds for the whole process, so it is restored."""
    torch.nn.attention.activate_flash_attention_impl(flash)
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def _product(name: str, is_trimmed: bool = True) -> Prepare:
    """A backend of ochat/model/attention/backends.py. Not trimmed: as a compiled run has it, with empty documents."""

    def prepare(documents: Documents, window: int | None) -> Attend:
        if name == "flex":
            torch._dynamo.reset()  # else another shape would be compiled for any shape
        where = documents if is_trimmed else with_empty(documents)
        attend = PackedAttention(where.cu_seqlens, where.max_seqlen, name, where.lengths, [window])
        return lambda q, k, v: attend(0, q, k, v, Scores(window))

    return prepare


COMPILED = ("fa4", "flex")
BACKENDS = (
    *(backend(name, _product(name), is_compiled=name in COMPILED) for name in product.BACKENDS),
    backend("varlen, FA3", _product("varlen"), flash="FA3"),
    backend("varlen, FA4", _product("varlen"), flash="FA4", is_compiled=True),
    *(backend(f"{name}, untrimmed", _product(name, False)) for name in ("varlen", "flash", "fa3")),
)
