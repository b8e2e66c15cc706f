"""Causal attention over packed documents that never see each other: SDPA per document, or a kernel on CUDA.

    attend = PackedAttention(cu_seqlens, max_seqlen, backend=default_backend("cpu", torch.float32), lengths=[3, 5])
    out = attend(layer, q, k, v, window)
`sdpa` is the definition and runs anywhere; `varlen` and `flash2` need CUDA and half precision, `flex` needs CUDA.
Letters: T, N, K, D; S documents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from ochat_kernels.reference_loss import soft_cap
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model.flex import FlexAttention

BACKENDS = ("sdpa", "varlen", "flash2", "flex")
HALF = (torch.bfloat16, torch.float16)
WITH_SOFTCAP = ("flex", "flash2", "sdpa")


class Attend(Protocol):
    """What a block calls: q (T, N, D), k and v (T, K, D) of one layer -> (T, N, D). `scale`: of q k^T, None:
    1 / sqrt(D); `softcap`: c of c * tanh(q k^T * scale / c), by which Gemma 2 bounds scores; 0: off."""

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor: ...


class PackedAttention:
    """softmax(q k^T * scale) v within each document of one packed batch, (T, N, D) in q's dtype; every layer calls
    the same object. A softcap bounds the scores before the softmax (Attend).

    A token sees itself and those before it in its document; with a `window`, only the nearest so many, itself included.
    Query head n uses key/value head n // (N / K). Args: cu_seqlens (S+1,) int32 on the device, from 0 to T, documents
    of length 0 allowed; max_seqlen: the longest; lengths: the S lengths on the host. Without them `sdpa` and `flex`
    read cu_seqlens once, which synchronises a CUDA device. windows: all that layers will ask for (`flex` makes their
    masks at once). Raises: ConfigError for a backend that is not known, cannot take these tensors or has no softcap.
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

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        check(self.backend, q.dtype, softcap)
        if self.flex is not None:
            return self.flex(q, k, v, window, scale, softcap)
        if self.backend == "varlen":
            return _varlen(q, k, v, self.cu_seqlens, self.max_seqlen, window, scale)
        if self.backend == "flash2":
            return _flash2(q, k, v, self.cu_seqlens, self.max_seqlen, window, scale, softcap)
        assert self.lengths is not None
        return _sdpa(q, k, v, self.lengths, window, scale, softcap)


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


def heads_first(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, softcap: float = 0.0
) -> Tensor:
    """Attention of a batch: q (B, N, Q, D), k and v (B, K, E, D) -> (B, N, Q, D). `mask`: bool, to (B, N, Q, E), True
    where a key is seen; None: causal, Q = E. With a softcap the scores, B N Q E numbers in fp32, are in memory."""
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (soft_cap(scores, softcap).masked_fill(~mask, float("-inf")).softmax(-1) @ v).to(q.dtype)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], window: int | None, scale: float | None, softcap: float
) -> Tensor:
    """One call per run of documents of equal length: padding is many short ones.

    Runs are split off at once: a slice each would make the backward fill a gradient of all tokens for every run.
    """
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"lengths sum to {sum(lengths)}, but there are {q.shape[0]} tokens")
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    sizes = [length * count for length, count in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outputs = [_equal_documents(q, k, v, count, window, scale, softcap) for (_, count), q, k, v in parts]
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _equal_documents(
    q: Tensor, k: Tensor, v: Tensor, count: int, window: int | None, scale: float | None, softcap: float
) -> Tensor:
    """`count` documents of one length, one after the other: as a batch (count, heads, length, D)."""
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    length, mask = q.shape[2], None
    if window is not None and window < length:  # True where key j <= query i and j > i - window
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return heads_first(q, k, v, mask, scale, softcap).transpose(1, 2).flatten(0, 1)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int | None, scale: float | None
) -> Tensor:
    options: dict[str, Any] = {"window_size": _span(window), "scale": scale}
    if q.shape[1] != k.shape[1]:
        if varlen_groups_heads():
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return _varlen_function()(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def varlen_groups_heads() -> bool:
    """Whether several query heads may read one key/value head; torch 2.11 wants as many of these, so they are
    copied."""
    return "enable_gqa" in inspect.signature(_varlen_function()).parameters


def _varlen_function() -> Any:
    from torch.nn.attention.varlen import varlen_attn  # takes a second

    return varlen_attn


def _flash2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    window: int | None,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """FlashAttention-2 of the package flash-attn, which groups heads itself."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    places = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(
        *(q, k, v, *places), softmax_scale=scale, causal=True, window_size=_span(window), softcap=softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _span(window: int | None) -> tuple[int, int]:
    """How many keys before and after its own a token sees; -1: all."""
    return (-1 if window is None else window - 1), 0
