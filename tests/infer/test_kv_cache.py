"""Token by token with a cache gives the logits of the whole sequence at once."""

import pytest
import torch

from ochat.infer.generate import KVCache
from ochat.model import hf
from ochat.model.transformer import pack_ids
from tests.model_families import FAMILIES, make, random_ids


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_logits_are_the_whole_sequences(family, tmp_path):
    make(family, tmp_path)
    model, sequences = hf.load(tmp_path, dtype="float32"), random_ids(25, 13, 18)
    prompts = [sequence[:-12] for sequence in sequences]  # 13, 1 and 6 tokens, then 12 more of each
    cache = KVCache(model.config, [len(prompt) for prompt in prompts], 25, torch.float32, "cpu")
    input_ids, position_ids, attend = pack_ids(model, prompts)
    steps = [model(input_ids, position_ids, cache.storing(attend))[cache.lengths.cumsum(0) - 1]]
    for offset in range(12):
        tokens = torch.tensor([sequence[offset - 12] for sequence in sequences])
        steps.append(model(tokens, cache.lengths, cache))
        cache.advance()
    found = torch.stack(steps, dim=1)  # (B, 13, V)
    for index, wanted in enumerate(model.logits(sequences)):
        assert (found[index] - wanted[-13:]).abs().max() <= 2e-5 * wanted.abs().max()


def test_unwritten_places_are_never_seen():
    """A large value wherever nothing was stored yet would reach the output through any wrong mask."""

    class Shape:
        num_layers, num_kv_heads, head_dim = 1, 2, 4

    cache = KVCache(Shape(), [3, 1], 8, torch.float32, "cpu")
    stored = torch.ones(4, 2, 4)
    cache.storing(lambda layer, q, k, v, window: q)(0, stored, stored, stored, None)
    empty = torch.arange(8)[None, :] >= cache.lengths[:, None]
    cache.values[0][empty] = 1e9
    new = torch.ones(2, 2, 4)
    assert torch.allclose(cache(0, new, new, new, None), new)
