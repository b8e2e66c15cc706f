"""Attention of a CPU in half precision: blocks of queries, products with a softmax in fp32 between them.

    out = equal_documents(q, k, v, count=2, scale=D**-0.5)
torch's own kernel for a CPU reaches a seventh of a core's product rate on documents of some hundred tokens; this takes
two thirds of its time at 300 tokens and nine tenths at 1,000. Documents are padded to whole blocks: each new shape of a
product costs a CPU half a megabyte for good, which oneDNN keeps.
Letters: T, N, K, D; g = N / K; B documents times K; L tokens of a document, of whole blocks inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_softmax_backward = torch.ops.aten._softmax_backward_data.default

KEPT = 512  # tokens of the longest document whose probabilities backward keeps
QUERIES = 64  # of a block. More of them compute more hidden scores; fewer make products too small to be fast


def equal_documents(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float) -> Tensor:
    """Causal attention of `count` documents of one length, one after the other: q (T, N, D), k and v (T, K, D), bf16 or
    fp16 -> (T, N, D). Backward keeps the probabilities of documents of at most KEPT, 2 N L bytes a token, and computes
    longer ones' again."""
    (T, N, D), K = q.shape, k.shape[1]
    length = T // count
    padding = -length % QUERIES
    q = q.view(count, length, K, N // K, D).transpose(1, 2)  # (count, K, L, g, D)
    k, v = (x.view(count, length, K, D).transpose(1, 2) for x in (k, v))
    q, k, v = F.pad(q, (0, 0, 0, 0, 0, padding)), F.pad(k, (0, 0, 0, padding)), F.pad(v, (0, 0, 0, padding))
    out = _Blocks.apply(q.flatten(2, 3).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
    return out.view(q.shape)[:, :, :length].transpose(1, 2).reshape(T, N, D)


class _Blocks(torch.autograd.Function):
    """q (B, L g, D), where the g query heads of a token follow each other, k and v (B, L, D) -> (B, L g, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, kept = torch.empty_like(q), []
        for rows, last, probabilities in _blocks(q, k, _probabilities(q, k, scale)):
            out[:, rows] = probabilities.to(q.dtype) @ v[:, :last]
            if k.shape[1] <= KEPT:
                kept.append(probabilities)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        wide_grad, wide_v = grad_out.float(), v.float().transpose(1, 2)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over blocks
        for rows, last, probabilities in _blocks(q, k, kept or _probabilities(q, k, ctx.scale)):
            grad_v[:, :last] += probabilities.to(q.dtype).transpose(1, 2) @ grad_out[:, rows]
            grad_probabilities = wide_grad[:, rows] @ wide_v[..., :last]
            grad_scores = _softmax_backward(grad_probabilities, probabilities, -1, torch.float32)
            narrow = grad_scores.mul_(ctx.scale).to(q.dtype)
            grad_q[:, rows] = narrow @ k[:, :last]
            grad_k[:, :last] += narrow.transpose(1, 2) @ q[:, rows]
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _blocks(q: Tensor, k: Tensor, values: Iterable[Tensor]) -> Iterator[tuple[slice, int, Tensor]]:
    """(its rows of q, how many keys they see at most, its value) of each block."""
    group = q.shape[1] // k.shape[1]
    for first, value in zip(range(0, k.shape[1], QUERIES), values, strict=True):
        last = first + QUERIES
        yield slice(first * group, last * group), last, value


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Iterator[Tensor]:
    """(B, rows, keys) of each block, in fp32."""
    group = q.shape[1] // k.shape[1]
    wide_q, wide_k = (q.float() * scale).split(QUERIES * group, dim=1), k.float().transpose(1, 2)
    square = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)  # True where a key is behind the query
    hidden = square.repeat_interleave(group, 0)
    for first, wide in zip(range(0, k.shape[1], QUERIES), wide_q, strict=True):
        scores = wide @ wide_k[..., : first + QUERIES]
        scores[..., first:].masked_fill_(hidden, float("-inf"))
        yield scores.softmax(-1)
