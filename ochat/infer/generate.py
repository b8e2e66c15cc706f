"""Answer prompts: one packed pass over all of them, then one token per step for each, with a KV cache.

    new_ids = generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=64, stop_ids={2})
An answer does not depend on the other prompts, sampled or not: each prompt has its own random draws.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat.errors import ConfigError
from ochat.infer.kv_cache import KVCache
from ochat.model.transformer import Transformer, pack_ids


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    device: torch.device | str | None = None,
) -> list[list[int]]:
    """The new ids of each prompt, without the stop id that ended it.

    An answer ends at a stop id, after `max_new_tokens`, or where the model's context does. Temperature 0 takes the
    largest logit; above it, tokens are drawn from the `top_k` likeliest (0: all), of which the fewest that reach
    `top_p` of the probability are kept. `seed`: of all, or of each prompt, which then draws as if it were alone.
    `device`: where to compute, if not on the device of the embeddings.
    Raises: ConfigError for settings out of range, an empty prompt or one that fills the context; DataError for a token
    id outside the vocabulary. Costs: a synchronisation per token.
    """
    sampler = Sampler(temperature, top_p, top_k, seed, len(prompts))
    room = _room(prompts, max_new_tokens, model.config.max_position_embeddings)
    if not prompts:
        return []
    input_ids, position_ids, attend = pack_ids(model, prompts, device)
    cache = _cache(model, prompts, room, input_ids.device)
    last = cache.lengths.cumsum(0) - 1  # rows of the prompts' last tokens
    logits = model(input_ids, position_ids, cache.storing(attend), lambda x, weight: F.linear(x[last], weight).float())
    answers: list[list[int]] = [[] for _ in prompts]
    open_answers = set(range(len(prompts)))
    while True:
        tokens = sampler(logits)
        _append(answers, open_answers, tokens.tolist(), frozenset(stop_ids), room)
        if not open_answers:
            return answers
        logits = model(tokens, cache.lengths, cache)
        cache.advance()


class Sampler:
    """Logits (B, V) fp32 to tokens (B,) int64. Each sequence has its own generator, made of (seed, its index), or of
    its own seed."""

    def __init__(
        self, temperature: float, top_p: float, top_k: int, seed: int | Sequence[int], num_sequences: int
    ) -> None:
        _check_range("temperature", temperature, math.isfinite(temperature) and temperature >= 0, "a number >= 0")
        _check_range("top_p", top_p, 0 < top_p <= 1, "a number in (0, 1]")
        _check_range("top_k", top_k, top_k >= 0, "a whole number >= 0")
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        own = [(seed, index) for index in range(num_sequences)] if isinstance(seed, int) else [(s, 0) for s in seed]
        seeds = [(value * 1_000_003 + index) % 2**63 for value, index in own]
        self.generators = [torch.Generator().manual_seed(value) for value in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities, order = (logits.double() / self.temperature).softmax(-1).sort(descending=True, stable=True)
        if self.top_k:
            probabilities[:, self.top_k :] = 0
            probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        reached = (probabilities * (before < self.top_p)).cumsum(-1)  # distribution function of the kept tokens
        draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators])
        # right=True: the first entry above the draw, which is always one of a kept token
        chosen = torch.searchsorted(reached, draws.to(reached.device) * reached[:, -1:], right=True)
        return order.gather(-1, chosen).squeeze(-1)


def _append(
    answers: list[list[int]], open_answers: set[int], tokens: list[int], stop_ids: frozenset[int], room: list[int]
) -> None:
    """Give each open answer its token, and close those that it ends."""
    for index in sorted(open_answers):
        if tokens[index] in stop_ids:
            open_answers.discard(index)
            continue
        answers[index].append(tokens[index])
        if len(answers[index]) == room[index]:
            open_answers.discard(index)


def _room(prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int) -> list[int]:
    """How many tokens each answer may have."""
    _check_range("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "a whole number >= 1")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} has no tokens; a model needs at least one to start from")
        if len(prompt) >= context:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens, but the model's context is {context}; shorten it"
            )
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _cache(model: Transformer, prompts: Sequence[Sequence[int]], room: list[int], device: torch.device) -> KVCache:
    lengths = [len(prompt) for prompt in prompts]
    capacity = max(length + more for length, more in zip(lengths, room, strict=True))
    return KVCache(model.config, lengths, capacity, model.compute_dtype or model.embed.weight.dtype, device)


def _check_range(name: str, value: float, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ConfigError(f"{name} = {value!r}; expected {expected}")
