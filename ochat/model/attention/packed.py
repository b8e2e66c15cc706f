"""Causal attention over packed documents that never see each other: SDPA per document, or a kernel on CUDA.

    attend = PackedAttention(cu_seqlens, max_seqlen, "sdpa", lengths=[3, 5]); out = attend(layer, q, k, v, Scores())
`sdpa` is the definition and runs anywhere; backends.py has them all. Letters: T, N, K, D; S documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model.attention.backends import BACKENDS, Documents, Needs, check
from ochat.model.attention.sdpa import Scores

LEAST_DOCUMENTS = 64  # of shapes that a backend plans for


class Attend(Protocol):
    """What a block calls: q (T, N, D), k and v (T, K, D) of one layer -> (T, N, D)."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor: ...


class PackedAttention:
    """softmax(q k^T * scale) v within each document of one packed batch, (T, N, D) in q's dtype; every layer calls
    the same object.

    A token sees itself and those before it in its document, as far as Scores.window reaches. Query head n uses
    key/value head n // (N / K). Args: cu_seqlens (S+1,) int32 on the device, from 0 to T, documents of length 0
    allowed; max_seqlen: at least the longest; lengths: the S lengths on the host. Without them `sdpa` and `flex` read
    cu_seqlens once, which synchronises a CUDA device. windows: all that layers will ask for (`flex` makes their masks
    at once). Raises: ConfigError for a backend that is not known or lacks what these tensors and scores need.
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
        self.backend, self.row = backend, BACKENDS[backend]
        if self.row.reads_lengths and lengths is None:
            lengths = cu_seqlens.diff().tolist()
        if self.row.plans_shapes and self.row.takes_empty():
            cu_seqlens, max_seqlen = few_shapes(cu_seqlens, max_seqlen)
        make = self.row.prepare
        prepared = make(cu_seqlens, sum(lengths or ()), tuple(windows) or (None,)) if make else None
        self.function, self.documents = self.row.load(), Documents(cu_seqlens, max_seqlen, lengths, prepared)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        if self.row.lacks(needs := Needs(q.dtype, q.shape[-1], scores)):
            check(self.backend, needs)  # raises
        return self.row.call(self.function, q, k, v, self.documents, scores)


def few_shapes(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, int]:
    """The same documents, with empty ones behind them up to a power of two, and a longest one of such a length."""
    missing = max(1 << (len(cu_seqlens) - 2).bit_length(), LEAST_DOCUMENTS) + 1 - len(cu_seqlens)
    spread = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(missing)]) if missing else cu_seqlens
    return spread, 1 << (max_seqlen - 1).bit_length()


def default_backend(device: torch.device | str, needs: Needs) -> str:
    """One of torch's own that has what is needed, without a test: varlen, flex or sdpa on CUDA, else sdpa."""
    is_cuda = torch.device(device).type == "cuda"
    return next(name for name in ("varlen", "flex", "sdpa")[2 * (not is_cuda) :] if not BACKENDS[name].lacks(needs))
