"""The definition of attention: torch's scaled_dot_product_attention, document by document, on any device; a CPU's half
precision by blocks.py, where neither a window nor a softcap matters.

    out = documents(q, k, v, lengths=[3, 5], scores=Scores(window=4))
Letters: T, N, K, D; B sequences of a batch, Q of its queries, E of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from ochat_kernels.reference_loss import soft_cap
from torch import Tensor

from ochat.model.attention import blocks

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scores:
    """What a layer does with q k^T before the softmax; the defaults are Llama's.

    `window`: a token sees itself and the window - 1 before it in its document; None: all of them. `scale`: of q k^T;
    None: 1 / sqrt(D). `softcap`: c of c * tanh(q k^T * scale / c), by which Gemma 2 bounds scores; 0: off.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float = 0.0

    def factor(self, head_dim: int) -> float:
        """What q k^T is multiplied by."""
        return head_dim**-0.5 if self.scale is None else self.scale


def documents(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scores: Scores) -> Tensor:
    """q (T, N, D), k and v (T, K, D) -> (T, N, D): one call per run of documents of equal length, as padding is many
    short ones.

    Runs are split off at once: a slice each would make the backward fill a gradient of all tokens for every run.
    """
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"lengths sum to {sum(lengths)}, but there are {q.shape[0]} tokens")
    runs = [(length, len(list(run))) for length, run in groupby(lengths) if length]
    sizes = [length * count for length, count in runs]
    parts = zip(runs, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outputs = [_equal_documents(q, k, v, count, scores) for (_, count), q, k, v in parts]
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def _equal_documents(q: Tensor, k: Tensor, v: Tensor, count: int, scores: Scores) -> Tensor:
    """`count` documents of one length, one after the other: as a batch (count, heads, length, D)."""
    length, window = q.shape[0] // count, scores.window
    is_plain = not scores.softcap and (window is None or window >= length)
    if is_plain and q.device.type == "cpu" and q.dtype in HALF:
        return blocks.equal_documents(q, k, v, count, scores.factor(q.shape[-1]))
    q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None
    if window is not None and window < length:  # True where key j <= query i and j > i - window
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    return heads_first(q, k, v, mask, scores).transpose(1, 2).flatten(0, 1)


def heads_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Attention of a batch: q (B, N, Q, D), k and v (B, K, E, D) -> (B, N, Q, D). `mask`: bool, to (B, N, Q, E), True
    where a key is seen; None: causal, Q = E; the window is the mask's. With a softcap the scores, B N Q E numbers in
    fp32, are in memory."""
    scale, softcap = scores.scale, scores.softcap
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    products = q.to(wide) @ k.transpose(-1, -2) * scores.factor(q.shape[-1])
    return (soft_cap(products, softcap).masked_fill(~mask, float("-inf")).softmax(-1) @ v).to(q.dtype)
