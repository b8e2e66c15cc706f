"""Causal attention over packed documents that never see each other: SDPA per document, or a kernel on CUDA.

    attend = PackedAttention(cu_seqlens, max_seqlen, backend=default_backend("cpu", torch.float32), lengths=[3, 5])
    out = attend(layer, q, k, v, Scores(window))
`sdpa` is the definition and runs anywhere; `varlen` and `flash2` need CUDA and half precision, `flex` needs CUDA.
Letters: T, N, K, D; S documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model import sdpa
from ochat.model.flex import FlexAttention
from ochat.model.sdpa import Scores

BACKENDS = ("sdpa", "varlen", "flash2", "flex")
HALF = (torch.bfloat16, torch.float16)
WITH_SOFTCAP = ("flex", "flash2", "sdpa")


class Attend(Protocol):
    """What a block calls: q (T, N, D), k and v (T, K, D) of one layer -> (T, N, D)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor: ...


class PackedAttention:
    """softmax(q k^T * scale) v within each document of one packed batch, (T, N, D) in q's dtype; every layer calls
    the same object.

    A token sees itself and those before it in its document, as far as Scores.window reaches. Query head n uses
    key/value head n // (N / K). Args: cu_seqlens (S+1,) int32 on the device, from 0 to T, documents of length 0
    allowed; max_seqlen: the longest; lengths: the S lengths on the host. Without them `sdpa` and `flex` read cu_seqlens
    once, which synchronises a CUDA device. windows: all that layers will ask for (`flex` makes their masks at once).
    Raises: ConfigError for a backend that is not known, cannot take these tensors or has no softcap.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        max_seqlen: int,
        backend: str = "sdpa",
        lengths: Sequence[int] | None = None,
        windows: Iterable[int | None] = (),
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError(f"attention = {backend!r} is not known; expected one of {', '.join(BACKENDS)}")
        self.cu_seqlens, self.max_seqlen, self.backend = cu_seqlens, max_seqlen, backend
        if backend in ("sdpa", "flex") and lengths is None:
            lengths = cu_seqlens.diff().tolist()
        self.lengths = lengths
        self.flex = FlexAttention(cu_seqlens, sum(lengths or ()), windows or (None,)) if backend == "flex" else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        check(self.backend, q.dtype, scores.softcap)
        if self.flex is not None:
            return self.flex(q, k, v, scores)
        if self.backend == "varlen":
            return _varlen(q, k, v, self.cu_seqlens, self.max_seqlen, scores)
        if self.backend == "flash2":
            return _flash2(q, k, v, self.cu_seqlens, self.max_seqlen, scores)
        assert self.lengths is not None
        return sdpa.documents(q, k, v, self.lengths, scores)


def default_backend(device: torch.device | str, dtype: torch.dtype, softcap: float = 0.0) -> str:
    """One that has what a model needs: on CUDA varlen in half precision and flex with a softcap, else sdpa."""
    if torch.device(device).type != "cuda":
        return "sdpa"
    if softcap:
        return "flex"
    return "varlen" if dtype in HALF else "sdpa"


def check(backend: str, dtype: torch.dtype, softcap: float) -> None:
    """Raises: ConfigError for a backend that cannot compute in this dtype or has no softcap."""
    if softcap and backend not in WITH_SOFTCAP:
        raise ConfigError(
            f"attention = {backend!r} has no softcap, but the model's is {softcap:g}; set train.attention to 'auto', "
            f"or to one of {', '.join(WITH_SOFTCAP)}"
        )
    if backend in ("varlen", "flash2") and dtype not in HALF:
        raise ConfigError(f"attention = {backend!r} computes in half precision, not {dtype}; set it to flex or sdpa")


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scores: Scores) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # takes a second

    options: dict[str, Any] = {"window_size": _span(scores.window), "scale": scores.scale}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 groups heads without it
        options["enable_gqa"] = True
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def _flash2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scores: Scores) -> Tensor:
    """FlashAttention-2 of the package flash-attn, which groups heads itself."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    places = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(
        *(q, k, v, *places), softmax_scale=scores.scale, causal=True, window_size=_span(scores.window),
        softcap=scores.softcap, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _span(window: int | None) -> tuple[int, int]:
    """How many keys before and after its own a token sees; -1: all."""
    return (-1 if window is None else window - 1), 0
