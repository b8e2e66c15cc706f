"""Who computes attention over packed documents: the product's backends, and candidates behind the same signature.

    for each in BACKENDS: with each.active(): out = each.prepare(documents, window)(q, k, v)
`prepare` imports, and makes what a batch needs once for all of its layers; whatever it raises is the reason that stands
in the table. Letters: T tokens, N query heads, K key/value heads, D head dim, S documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.attention
from torch import Tensor

from ochat.model.attention import PackedAttention


class Documents(NamedTuple):
    """Where the documents of a batch lie, as the loader says it."""

    cu_seqlens: Tensor  # (S+1,) int32 on the device
    max_seqlen: int  # at least the longest
    lengths: list[int]  # S of them, empty ones at the end


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (T, N, D), k and v (T, K, D) -> (T, N, D), causal
Prepare = Callable[[Documents, int | None], Attend]  # a window: a token sees itself and so many less one before it


@dataclass(frozen=True)
class Backend:
    name: str
    prepare: Prepare
    flash: str | None = None  # the FlashAttention that torch is to use inside, by its name in torch's registry
    is_compiled: bool = False  # takes seconds to get ready for every shape

    @contextmanager
    def active(self) -> Iterator[None]:
        """Torch's choice of FlashAttention holds for the whole process: it is made here and put back."""
        if self.flash is None:
            yield
            return
        torch.nn.attention.activate_flash_attention_impl(self.flash)
        try:
            yield
        finally:
            torch.nn.attention.restore_flash_attention_impl()


def _product(name: str) -> Prepare:
    """A backend of ochat/model/attention.py."""

    def prepare(documents: Documents, window: int | None) -> Attend:
        attend = PackedAttention(documents.cu_seqlens, documents.max_seqlen, name, documents.lengths)
        return lambda q, k, v: attend(0, q, k, v, window)

    return prepare


def _flash(module: str, unbounded: int | None) -> Prepare:
    """`flash_attn_varlen_func` of a package; `unbounded` is its word for a side without a window."""

    def prepare(documents: Documents, window: int | None) -> Attend:
        function = import_module(module).flash_attn_varlen_func
        options: dict[str, Any] = {f"cu_seqlens_{side}": documents.cu_seqlens for side in "qk"}
        options |= {f"max_seqlen_{side}": documents.max_seqlen for side in "qk"}
        span = (unbounded, unbounded) if window is None else (window - 1, 0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(q, k, v, causal=True, window_size=span, **options)
            return result[0] if isinstance(result, tuple) else result  # some versions give log-sum-exps too

        return attend

    return prepare


def _cudnn(documents: Documents, window: int | None) -> Attend:
    """torch's operator below `varlen_attn`: that function never takes it (torch 2.13), and hands its backward arguments
    in another order than it has, so it is called directly."""
    if window is not None:
        raise NotImplementedError("torch's cuDNN attention has no sliding window")
    function, places, longest = torch.ops.aten._cudnn_attention_forward, documents.cu_seqlens, documents.max_seqlen

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        has_lse = any(x.requires_grad for x in (q, k, v))
        return function(q, k, v, None, places, places, longest, longest, has_lse, 0.0, True, False)[0]

    return attend


def _flex(documents: Documents, window: int | None) -> Attend:
    """flex_attention with the mask of the documents' blocks, compiled where there is a card."""
    flex = import_module("torch.nn.attention.flex_attention")
    sizes = documents.cu_seqlens.diff()
    document = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)  # (T,)
    reach = len(document) if window is None else window

    def is_seen(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j) & (i - j < reach)

    mask = flex.create_block_mask(is_seen, None, None, len(document), len(document), device=sizes.device)
    torch._dynamo.reset()  # else another shape would be compiled for any shape
    function = torch.compile(flex.flex_attention, dynamic=False) if sizes.is_cuda else flex.flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # (1, N or K, T, D)
        return function(*heads, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)

    return attend


BACKENDS = (
    Backend("sdpa", _product("sdpa")),
    Backend("varlen", _product("varlen")),
    Backend("varlen, FA3", _product("varlen"), flash="FA3"),
    Backend("varlen, FA4", _product("varlen"), flash="FA4", is_compiled=True),
    Backend("flash-attn 2", _flash("flash_attn", -1)),
    Backend("flash-attn 3", _flash("flash_attn_interface", -1)),
    Backend("flash-attn 4", _flash("flash_attn.cute", None), is_compiled=True),
    Backend("cuDNN", _cudnn),
    Backend("flex", _flex, is_compiled=True),
)
