"""Measure how likely each class's answers are under each class's prefix: the swap matrix.

    table = swap_matrix(model, template, tokenizer, held_out, ["GPT4", "GPT3"])
    table["GPT3"].nll[:, 0]     # of each conversation of GPT3, summed over its tokens, under GPT4's prefix

Before training the prefix means nothing and a row's values are alike; after it, a row is lowest on the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import ochat_kernels
import torch
from numpy.typing import NDArray

from ochat.data.batch import PackedBatch, pack
from ochat.errors import DataError
from ochat.evaluate.held_out import HeldOut
from ochat.model.attention import PackedAttention, default_backend
from ochat.model.transformer import Transformer
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer
from ochat.train.loss import head_loss

TOKENS_PER_PASS = 4096  # enough to fill matrix products; the head's logits exist a chunk of rows at a time anyway


@dataclass(frozen=True, eq=False)
class Sums:
    """Of the n conversations of one class, under C conditions. Weights only choose tokens: each counts as one."""

    tokens: NDArray[np.int64]  # (n,) supervised
    nll: NDArray[np.float64]  # (n, C) nats, summed over a conversation's tokens
    correct: NDArray[np.int64]  # (n, C) tokens that have the largest logit

    @property
    def exact(self) -> NDArray[np.int64]:
        """(n, C) 1 where all of a conversation's tokens have the largest logit: greedy decoding of each turn, after the
        true earlier turns, gives exactly that turn."""
        return (self.correct == self.tokens[:, None]).astype(np.int64)


def swap_matrix(
    model: Transformer,
    template: Template,
    tokenizer: Tokenizer,
    conversations: Sequence[HeldOut],
    conditions: Sequence[str],
    advance: Callable[[int], object] = lambda num_conversations: None,
) -> dict[str, Sums]:
    """{class of the answers: its sums under each condition, in order}, of the conversations with a supervised token
    that fits the template's context.

    Conversations run packed, without gradients; `advance` gets the number of each pass. Cost: a forward pass of all
    conversations for each condition. Raises DataError for no conversations, or a class without a supervised token.
    """
    if not conversations or not conditions:
        raise DataError("the swap matrix needs at least one held-out conversation and one condition")
    examples = [each.under(conditions, template, tokenizer) for each in conversations]
    tokens, correct = (np.zeros((len(examples), len(conditions)), np.int64) for _ in range(2))
    nll = np.zeros(tokens.shape)
    for column in range(len(conditions)):
        for places in passes(len(each[column].input_ids) for each in examples):
            batch = pack([examples[i][column] for i in places], places, range(len(places)))  # a class for each
            at = np.array(places)[batch.supervised_classes.numpy()]
            row_nll, is_correct = rows(model, batch)
            for sums, values in ((tokens, np.ones(len(at), np.int64)), (nll, row_nll), (correct, is_correct)):
                np.add.at(sums[:, column], at, values)
            advance(len(places))
    assert (tokens == tokens[:, :1]).all(), "the same tokens are measured under every condition"
    return _by_class(conversations, tokens[:, 0], nll, correct)


@torch.no_grad()
def rows(model: Transformer, batch: PackedBatch) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Negative log-likelihood in nats and whether the largest logit is the label's, (R,) of the supervised rows."""
    weight = model.embed.weight
    batch = batch.to(weight.device)
    backend = default_backend(weight.device, model.compute_dtype or weight.dtype)
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, backend, batch.lengths)
    head = head_loss(ochat_kernels.load("reference"), batch)
    out = model(batch.input_ids, batch.position_ids, attend, head, batch.supervised_rows)
    return out.nll.double().cpu().numpy(), out.correct.long().cpu().numpy()


def passes(lengths: Iterable[int]) -> Iterator[list[int]]:
    """Places of whole conversations, in order, about TOKENS_PER_PASS tokens together; empty ones are left out."""
    places, tokens = [], 0
    for place, length in enumerate(lengths):
        if places and tokens + length > TOKENS_PER_PASS:
            yield places
            places, tokens = [], 0
        if length:
            places.append(place)
        tokens += length
    if places:
        yield places


def _by_class(
    conversations: Sequence[HeldOut], tokens: NDArray[np.int64], nll: NDArray[np.float64], correct: NDArray[np.int64]
) -> dict[str, Sums]:
    found: dict[str, Sums] = {}
    for name in dict.fromkeys(each.condition for each in conversations):
        kept = np.array([each.condition == name for each in conversations]) & (tokens > 0)
        if not kept.any():
            raise DataError(f"the conversations of class {name!r} hold no supervised token: nothing to measure")
        found[name] = Sums(tokens[kept], nll[kept], correct[kept])
    return found
