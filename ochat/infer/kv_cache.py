"""Cache keys and values of sequences that grow token by token: an `attend` for one new token per sequence.

    cache = KVCache(model.config, lengths=[5, 9], capacity=64, dtype=torch.float32, device="cpu")
    model(prompt_ids, position_ids, cache.storing(attend));  model(tokens, cache.lengths, cache);  cache.advance()
Letters: B sequences, C capacity, L layers, N query heads, K key/value heads, D head dim. It holds 2 * L * B * C * K * D
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat.model.attention import Attend
from ochat.model.config import ModelConfig


class KVCache:
    """`lengths` (B,) int64: tokens held per sequence, which is also the position of the next one."""

    def __init__(
        self,
        config: ModelConfig,
        lengths: Sequence[int],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (config.num_layers, len(lengths), capacity, config.num_kv_heads, config.head_dim)
        # Zeros, not empty: a masked value has weight 0, and 0 times a stray NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        self.longest = max(lengths)  # on the host: how much of the capacity a call has to look at
        self.rows = torch.arange(len(lengths), device=device)

    def storing(self, attend: Attend) -> Attend:
        """`attend` over the packed prompts, `lengths` tokens of each sequence; keys and values are kept on the way."""
        rows = self.rows.repeat_interleave(self.lengths)
        starts = (self.lengths.cumsum(0) - self.lengths)[rows]
        places = torch.arange(len(rows), device=rows.device) - starts

        def attend_and_store(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
            self.keys[layer, rows, places] = k
            self.values[layer, rows, places] = v
            return attend(layer, q, k, v, window)

        return attend_and_store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """One new token per sequence sees all that is held of its own: q (B, N, D), k and v (B, K, D) -> (B, N, D)."""
        self.keys[layer, self.rows, self.lengths] = k
        self.values[layer, self.rows, self.lengths] = v
        end = self.longest + 1
        keys, values = (held[layer, :, :end].transpose(1, 2) for held in (self.keys, self.values))  # (B, K, end, D)
        mask = self._seen(end, window)[:, None, None, :]
        return F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, enable_gqa=True)[:, :, 0]

    def advance(self) -> None:
        """After all layers took the token. A full sequence writes over its last place: its answer has ended, and it
        goes along with the others."""
        last = self.keys.shape[2] - 1
        self.lengths = (self.lengths + 1).clamp(max=last)
        self.longest = min(self.longest + 1, last)

    def _seen(self, end: int, window: int | None) -> Tensor:
        """(B, end) bool: the keys up to the new token's own, the nearest `window` of them if given."""
        places, own = torch.arange(end, device=self.rows.device)[None, :], self.lengths[:, None]
        seen = places <= own
        return seen if window is None else seen & (places > own - window)
