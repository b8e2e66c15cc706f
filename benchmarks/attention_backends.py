"""Implementations of attention over packed documents: the product's backends, and candidates.

    for each in BACKENDS: out = each.load()({"q": q, "k": k, "v": v, "documents": documents, "window": None})
If an import or a call fails, the table shows the reason. Letters as in attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from benchmarks.attention import Documents
from benchmarks.implementations import Arguments, Function, Implementation
from ochat.model.attention import PackedAttention
from ochat.model.sdpa import Scores

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


def _product(name: str) -> Prepare:
    """A backend of ochat/model/attention.py."""

    def prepare(documents: Documents, window: int | None) -> Attend:
        if name == "flex":
            torch._dynamo.reset()  # else another shape would be compiled for any shape
        attend = PackedAttention(documents.cu_seqlens, documents.max_seqlen, name, documents.lengths, [window])
        return lambda q, k, v: attend(0, q, k, v, Scores(window))

    return prepare


def _flash(module: str, unbounded: int | None) -> Prepare:
    """`flash_attn_varlen_func` of a package; `unbounded` is its value for a side without a window."""

    def prepare(documents: Documents, window: int | None) -> Attend:
        function = import_module(module).flash_attn_varlen_func
        options: dict[str, Any] = {f"cu_seqlens_{side}": documents.cu_seqlens for side in "qk"}
        options |= {f"max_seqlen_{side}": documents.max_seqlen for side in "qk"}
        span = (unbounded, unbounded) if window is None else (window - 1, 0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, causal=True, window_size=span, **options)
            return result[0] if isinstance(result, tuple) else result  # some versions return log-sum-exps too

        return attend

    return prepare


def _cudnn(documents: Documents, window: int | None) -> Attend:
    """torch's cuDNN operator, called directly: `varlen_attn` never selects it (torch 2.13) and passes its backward
    arguments in the wrong order."""
    if window is not None:
        raise NotImplementedError("torch's cuDNN attention has no sliding window")
    function, places, longest = torch.ops.aten._cudnn_attention_forward, documents.cu_seqlens, documents.max_seqlen

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        has_lse = any(x.requires_grad for x in (q, k, v))
        return function(q, k, v, None, places, places, longest, longest, has_lse, 0.0, True, False)[0]

    return attend


BACKENDS = (
    backend("sdpa", _product("sdpa")),
    backend("varlen", _product("varlen")),
    backend("varlen, FA3", _product("varlen"), flash="FA3"),
    backend("varlen, FA4", _product("varlen"), flash="FA4", is_compiled=True),
    backend("flash-attn 2", _product("flash2")),
    backend("flash-attn 3", _flash("flash_attn_interface", -1)),
    backend("flash-attn 4", _flash("flash_attn.cute", None), is_compiled=True),
    backend("cuDNN", _cudnn),
    backend("flex", _product("flex"), is_compiled=True),
)
