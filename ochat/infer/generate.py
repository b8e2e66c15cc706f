"""Answer prompts: one packed pass over all of them, then one token per step for each, with a KV cache.

    new_ids = generate(model, [[1, 5, 9], [1, 7]], max_new_tokens=64, stop_ids={2})
    for tokens in steps(model, [[1, 5, 9]], max_new_tokens=64, stop_ids={2}): ...       # {0: 17}, then {0: 4}, ...
An answer does not depend on the other prompts, sampled or not: each prompt has its own random draws.

Guidance, with two prompts for each answer, one of the class that is wanted and one of the class to keep away from:

    generate(model, wanted, against=others, guidance=1.5, ...)      # z = z_against + 1.5 * (z_wanted - z_against)

Letters: B sequences, C capacity, L layers, N query heads, K key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ochat.errors import ConfigError
from ochat.model import rope
from ochat.model.attention.packed import Attend
from ochat.model.attention.sdpa import Scores, heads_first
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer, pack_ids
from ochat.overrides import expect
from ochat.text.tokenizer import Tokenizer


def complete(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    stop_ids: Collection[int],
    most: int,
    *,
    guidance: float = 1.0,
    against: Sequence[Sequence[int]] = (),
    **settings: Any,
) -> list[tuple[str, bool]]:
    """(the answer's text, whether it was cut before it reached a stop id) of each prompt. An answer has at most `most`
    tokens. Other arguments, errors and costs: as steps."""
    told: dict[str, Any] = {"max_new_tokens": most, "stop_ids": stop_ids, "guidance": guidance, "against": against}
    answers = generate(model, prompts, **told, **settings)
    room = _room(_sides(prompts, against, guidance), most, model.config.max_position_embeddings)
    return [(tokenizer.decode(ids), len(ids) == count) for ids, count in zip(answers, room, strict=True)]


def generate(model: Transformer, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """The new ids of each prompt, without the stop id that ended it. `settings`, errors and costs: as steps."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in steps(model, prompts, **settings):
        for index, token in tokens.items():
            answers[index].append(token)
    return answers


@torch.no_grad()
def steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    guidance: float = 1.0,
    against: Sequence[Sequence[int]] = (),
    device: torch.device | str | None = None,
) -> Iterator[dict[int, int]]:
    """Step by step the next id of each answer that goes on, {number of its prompt: id}; never a stop id.

    An answer ends at a stop id, after `max_new_tokens`, or where the model's context does. Temperature 0 takes the
    largest logit; above it, tokens are drawn from the `top_k` likeliest (0: all), of which the fewest that reach
    `top_p` of the probability are kept. `seed`: of all, or of each prompt, which then draws as if it were alone.
    `guidance`: s of z = z_against + s * (z - z_against), the logits that tokens are taken from (classifier-free
    guidance, arXiv 2207.12598; of policies by CFGRL, 2505.23458, and RECAP, 2511.14759). z_against follow `against`, a
    second prompt for each, and the same answer. 1: z, `against` is not read; 0: z_against.
    `device`: where to compute, if not on the device of the embeddings.
    Raises: ConfigError for settings out of range, an empty prompt or one that fills the context; DataError for a token
    id outside the vocabulary. Costs: a synchronisation per token; for LongRoPE one more pass over all sequences where
    one grows beyond the original length: then all its keys turn by the long factors, as in training. With guidance a
    batch of twice as many sequences.
    """
    sampler = Sampler(temperature, top_p, top_k, seed, len(prompts))
    expect(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "a whole number >= 1")
    expect(math.isfinite(guidance) and guidance >= 0, "guidance", guidance, "a number >= 0")
    sides, context = _sides(prompts, against, guidance), model.config.max_position_embeddings
    for side in sides:
        _check_lengths([len(prompt) for prompt in side], context)
    if not prompts:
        return
    held = [list(prompt) for side in sides for prompt in side]
    lengths = [len(sequence) for sequence in held]
    capacity = min(max(lengths) + max_new_tokens, context)
    weight = model.embed.weight
    cache = KVCache(model.config, lengths, capacity, model.compute_dtype or weight.dtype, device or weight.device)
    logits = _read(model, held, cache, device)
    room = dict(enumerate(_room(sides, max_new_tokens, context)))  # of open answers
    while True:
        tokens = sampler(logits if guidance == 1 else _extrapolated(logits, guidance))
        said = tokens.tolist()
        room = {index: left - 1 for index, left in room.items() if said[index] not in stop_ids}
        yield {index: said[index] for index in room}
        room = {index: left for index, left in room.items() if left}
        if not room:
            return
        grown = []  # lengths
        for index in room:
            for sequence in held[index :: len(prompts)]:  # with guidance two
                sequence.append(said[index])
                grown.append(len(sequence))
        if any(rope.turns_long(model.config.rope, length) for length in grown):
            logits = _read(model, held, cache, device)  # the kept keys were rotated for a short document
            continue
        logits = model(tokens.repeat(len(sides)), cache.lengths, cache)
        cache.advance()


def _read(
    model: Transformer, sequences: Sequence[Sequence[int]], cache: KVCache, device: torch.device | str | None
) -> Tensor:
    """Logits (B, V) behind the sequences, by one packed pass over all of them, after which the cache holds them."""
    input_ids, position_ids, attend = pack_ids(model, sequences, device)
    cache.restart([len(sequence) for sequence in sequences])
    last = cache.lengths.cumsum(0) - 1  # rows of the last tokens
    return model(input_ids, position_ids, cache.storing(attend), rows=last)


def _sides(
    prompts: Sequence[Sequence[int]], against: Sequence[Sequence[int]], guidance: float
) -> list[Sequence[Sequence[int]]]:
    """The prompts, and with guidance those of `against`. Raises: ConfigError where each has none of its own."""
    if guidance == 1:
        return [prompts]
    if len(against) != len(prompts):
        raise ConfigError(f"guidance needs a second prompt for each: {len(prompts)} in against, not {len(against)}")
    return [prompts, against]


def _room(sides: Sequence[Sequence[Sequence[int]]], most: int, context: int) -> list[int]:
    """How many tokens each answer may have."""
    return [min(most, context - max(map(len, each))) for each in zip(*sides, strict=True)]


def _extrapolated(logits: Tensor, guidance: float) -> Tensor:
    """Logits (2 B, V), those of `against` behind the others -> (B, V)."""
    wanted, against = logits.chunk(2)
    return torch.lerp(against, wanted, guidance)  # 0 and 1 give one of them to the bit


def _check_lengths(lengths: Sequence[int], context: int) -> None:
    for index, length in enumerate(lengths):
        if not length:
            raise ConfigError(f"prompt {index} has no tokens; a model needs at least one to start from")
        if length >= context:
            raise ConfigError(f"prompt {index} has {length} tokens, but the model's context is {context}; shorten it")


class Sampler:
    """Logits (B, V) fp32 to tokens (B,) int64. Each sequence has its own generator, made of (seed, its index), or of
    its own seed."""

    def __init__(
        self, temperature: float, top_p: float, top_k: int, seed: int | Sequence[int], num_sequences: int
    ) -> None:
        expect(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, "a number >= 0")
        expect(0 < top_p <= 1, "top_p", top_p, "a number in (0, 1]")
        expect(top_k >= 0, "top_k", top_k, "a whole number >= 0")
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


class KVCache:
    """Keys and values of sequences that grow token by token: an `attend` for one new token per sequence. It holds
    2 * L * B * C * K * D numbers.

    `lengths` (B,) int64: tokens held per sequence, which is also the position of the next one.
    """

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
        self.rows = torch.arange(len(lengths), device=device)
        self.restart(lengths)

    def restart(self, lengths: Sequence[int]) -> None:
        """Of each sequence `lengths` tokens are held, or will be by `storing`."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.rows.device)
        self.longest = max(lengths)  # on the host: how much of the capacity a call has to look at

    def storing(self, attend: Attend) -> Attend:
        """`attend` over the packed prompts, `lengths` tokens of each sequence; keys and values are kept on the way."""
        rows = self.rows.repeat_interleave(self.lengths)
        starts = (self.lengths.cumsum(0) - self.lengths)[rows]
        places = torch.arange(len(rows), device=rows.device) - starts

        def attend_and_store(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            self.keys[layer, rows, places] = k
            self.values[layer, rows, places] = v
            return attend(layer, q, k, v, scores)

        return attend_and_store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """One new token per sequence sees all that is held of its own: q (B, N, D), k and v (B, K, D) -> (B, N, D)."""
        self.keys[layer, self.rows, self.lengths] = k
        self.values[layer, self.rows, self.lengths] = v
        end = self.longest + 1
        keys, values = (held[layer, :, :end].transpose(1, 2) for held in (self.keys, self.values))  # (B, K, end, D)
        mask = self._seen(end, scores.window)[:, None, None, :]
        return heads_first(q[:, :, None], keys, values, mask, scores)[:, :, 0]

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
