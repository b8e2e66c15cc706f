"""torch's flex_attention over packed documents: a block mask made on the device, and the scores' softcap.

    attend = FlexAttention(cu_seqlens, num_tokens=8, windows=[None, 4]); out = attend(q, k, v, Scores(4, softcap=50.0))
Compiled on CUDA; on a CPU it runs as it is written, forward only. Letters: T, N, K, D; S documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ochat.model.attention.sdpa import Scores

BLOCK = 128  # rows and keys of a block that is skipped, taken whole, or masked
KERNEL: Any = {"BACKEND": "TRITON"}  # for fewer rows than BLOCK torch 2.13 wants another, which it cannot always make


class FlexAttention:
    """Attention of one packed batch, in blocks of BLOCK rows and keys: those that no row sees are skipped.

    Args: cu_seqlens (S+1,) int32 on the device, from 0 to T; `windows`: those of all layers. Costs: for each of the
    windows some launches and (T / BLOCK)^2 numbers; no synchronisation.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int, windows: Iterable[int | None]) -> None:
        # all masks now: made in a block, one would be part of what torch.compile sees there
        self.masks = {window: block_mask(cu_seqlens, num_tokens, window) for window in set(windows)}
        self.function = _function(cu_seqlens.device.type)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """q (T, N, D), k and v (T, K, D) -> (T, N, D)."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self.function(
            *(q, k, v, _capped(scores.softcap) if scores.softcap else None, self.masks[scores.window]),
            scale=scores.scale, enable_gqa=q.shape != k.shape, kernel_options=KERNEL,
        )  # fmt: skip
        return out[0].transpose(0, 1)


def block_mask(cu_seqlens: Tensor, num_tokens: int, window: int | None) -> Any:
    """The BlockMask of causal documents, with a `window` of the nearest keys.

    A row sees the keys from `first` of it to itself. `first` never falls from row to row, so the keys that any row of a
    block sees begin at the first row's, and those that every row sees at the last one's.
    """
    from torch.nn.attention.flex_attention import BlockMask  # takes a second

    rows = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    first = cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]  # (T,)
    if window is not None:
        first = torch.maximum(first, rows - (window - 1))

    def is_seen(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (key >= first[row])

    starts = rows[::BLOCK]
    above = starts[:, None] > starts  # the block's rows come after all of the other's keys
    last = (starts + BLOCK - 1).clamp(max=num_tokens - 1)
    whole = above & (first[last][:, None] <= starts) & (starts + BLOCK <= num_tokens)[:, None]
    seen = (starts[:, None] >= starts) & (first[starts][:, None] < starts + BLOCK)
    lists = *_ordered(seen & ~whole), *_ordered(whole)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=is_seen, seq_lengths=(num_tokens, num_tokens))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of a bool per block of rows and block of keys: how many are true for each block of rows, and which come first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, _batch: Tensor, _head: Tensor, _row: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score


@lru_cache(maxsize=1)
def _function(device_type: str) -> Callable[..., Any]:
    """One for the process, so that a kernel is compiled once. Without the compiler all T^2 scores would be in memory,
    so what it cannot compile is an error."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True) if device_type == "cuda" else flex_attention
