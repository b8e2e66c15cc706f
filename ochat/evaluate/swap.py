"""The swap matrix: how likely each class's answers are under each class's prefix.

    table = swap_matrix(model, template, tokenizer, conversations, ["GPT4", "GPT3"])
    table["GPT3"]["GPT4"]   # nll of GPT3's answers behind GPT4's prefix
Before training the prefix means nothing and a row's values are alike; after it, a row is lowest on the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import ochat_kernels
import torch

from ochat.data.batch import Example, PackedBatch, pack
from ochat.data.conversation import Conversation
from ochat.data.template import Template
from ochat.data.tokenizer import Tokenizer
from ochat.errors import DataError
from ochat.model.attention import PackedAttention, default_backend
from ochat.model.transformer import Transformer

TOKENS_PER_PASS = 2048  # the head's fp32 logits of the supervised ones among them stay below a few hundred MB


def swap_matrix(
    model: Transformer,
    template: Template,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    conditions: Sequence[str],
) -> dict[str, dict[str, float]]:
    """{class of the answers: {condition in the prefix: nll}}, in nats per supervised token, each counting as one.

    Conversations are encoded as for training under each condition in turn and run packed, without gradients. Tokens
    behind the template's context are left out, as `ochat prepare` does. Cost: one forward pass of all conversations
    per condition. Raises DataError for no conversations, or a class without a supervised token.
    """
    if not conversations or not conditions:
        raise DataError("the swap matrix needs at least one held-out conversation and one condition")
    classes = list(dict.fromkeys(conversation.condition for conversation in conversations))
    table: dict[str, dict[str, float]] = {name: {} for name in classes}
    for condition in conditions:
        examples = [_example(conversation, condition, template, tokenizer) for conversation in conversations]
        for name, nll in zip(classes, _nll_per_class(model, examples, conversations, classes), strict=True):
            table[name][condition] = nll
    return table


def _example(conversation: Conversation, condition: str, template: Template, tokenizer: Tokenizer) -> Example:
    ids, weights = template.encode(replace(conversation, condition=condition), tokenizer)
    kept = slice(template.context)
    return Example(np.array(ids[kept], np.int64), np.array(weights[kept], np.float32), condition)


def _nll_per_class(
    model: Transformer, examples: Sequence[Example], conversations: Sequence[Conversation], classes: list[str]
) -> list[float]:
    sums, counts = torch.zeros(len(classes), dtype=torch.float64), torch.zeros(len(classes), dtype=torch.int64)
    for indices in _passes(len(example.input_ids) for example in examples):
        ids = [classes.index(conversations[i].condition) for i in indices]
        batch = pack([examples[i] for i in indices], indices, ids)
        sums.index_add_(0, batch.row_classes, row_nll(model, batch).double().cpu())
        counts += torch.bincount(batch.row_classes, minlength=len(classes))
    for name, count in zip(classes, counts.tolist(), strict=True):
        if count == 0:
            raise DataError(f"the conversations of class {name!r} hold no supervised token: nothing to measure")
    return (sums / counts).tolist()


def _passes(lengths: Iterable[int]) -> Iterator[list[int]]:
    """Places of whole conversations, in order, about TOKENS_PER_PASS tokens together."""
    places, tokens = [], 0
    for place, length in enumerate(lengths):
        if places and tokens + length > TOKENS_PER_PASS:
            yield places
            places, tokens = [], 0
        places.append(place)
        tokens += length
    if places:
        yield places


@torch.no_grad()
def row_nll(model: Transformer, batch: PackedBatch) -> torch.Tensor:
    """Negative log-likelihood (R,) fp32 of the batch's supervised rows, in nats, on the model's device."""
    weight = model.embed.weight
    batch = batch.to(weight.device)
    backend = default_backend(weight.device, model.compute_dtype or weight.dtype)
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, backend, batch.lengths)
    ops = ochat_kernels.load("reference")

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        labels, weights = batch.labels, batch.loss_weights
        return ops.linear_cross_entropy(hidden, weight, labels, weights, rows=batch.rows).nll

    return model(batch.input_ids, batch.position_ids, attend, head=head)[batch.rows]
