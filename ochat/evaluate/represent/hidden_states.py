"""Represent a conversation by the mean over its tokens of the last layer's hidden states, after the final norm.

    found = views(model, compared, sample, "GPT4", tokenizer);  found["own_answers"]     # (n, H) fp32

These are the states that the head multiplies: transformers' `hidden_states[-1]`. Letters: T packed tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ochat.data.batch import Example
from ochat.evaluate.represent.compared_models import ComparedModel
from ochat.evaluate.represent.sample import Sample
from ochat.evaluate.swap import passes
from ochat.model.transformer import Transformer, pack_ids
from ochat.text.tokenizer import Tokenizer

TOKENS = ("all", "answers")
# under which prefixes a conversation is read, and over which of its tokens the mean is taken
VIEWS = ("own_all", "own_answers", "one_all", "one_answers", "words")


def views(
    model: Transformer,
    compared: ComparedModel,
    sample: Sample,
    one_prefix: str,
    tokenizer: Tokenizer,
    advance: Callable[[int], object] = lambda num_conversations: None,
) -> dict[str, NDArray[np.float32]]:
    """The sample's states (n, H) in each of VIEWS. Costs: a forward pass of all conversations under their own prefixes,
    and, where prefixes name classes, one under the one prefix."""
    own, one = sample.written(one_prefix, compared.template, tokenizer)
    of_own = pooled(model, own, advance)
    of_one = pooled(model, one, advance) if compared.names_classes else of_own
    found = {f"own_{tokens}": of_own[tokens] for tokens in TOKENS}
    found |= {f"one_{tokens}": of_one[tokens] for tokens in TOKENS}
    return found | {"words": words(model, own)}


@torch.no_grad()
def pooled(
    model: Transformer, examples: Sequence[Example], advance: Callable[[int], object] = lambda num_conversations: None
) -> dict[str, NDArray[np.float32]]:
    """{"all": means over all tokens, "answers": over the tokens of weight other than 0}, (n, H) fp32 each, in order.

    Conversations run packed and sorted by length, without the head. Costs: a forward pass of all tokens, 2 n H numbers.
    Raises: DataError for a token id outside the vocabulary.
    """
    states = {tokens: np.empty((len(examples), model.config.hidden_size), np.float32) for tokens in TOKENS}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    for run in passes(len(examples[i].input_ids) for i in order):
        places = [order[i] for i in run]
        batch = [examples[i] for i in places]
        input_ids, position_ids, attend = pack_ids(model, [each.input_ids.tolist() for each in batch])
        means = model(input_ids, position_ids, attend, partial(_means, batch))
        for tokens, found in zip(TOKENS, means, strict=True):
            states[tokens][places] = found.cpu().numpy()
        advance(len(places))
    return states


@torch.no_grad()
def words(model: Transformer, examples: Sequence[Example]) -> NDArray[np.float32]:
    """Means of the answers' input embeddings, (n, H) fp32: which words they contain, without order or context."""
    weight = model.embed.weight
    means = []
    for each in examples:
        ids = torch.from_numpy(each.input_ids[each.loss_weights != 0]).to(weight.device)
        means.append(model.embed(ids, torch.float32).mean(0))
    return torch.stack(means).cpu().numpy()


def _means(batch: Sequence[Example], hidden: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """(S, H) fp32 over all tokens and over the answers'. A mean a conversation: sums by index are atomic additions on
    CUDA, in another order each time."""
    lengths = [len(each.input_ids) for each in batch]
    is_answer = np.concatenate([each.loss_weights != 0 for each in batch])
    rows = torch.from_numpy(np.flatnonzero(is_answer)).to(hidden.device)
    counts = [int((each.loss_weights != 0).sum()) for each in batch]
    parts = (hidden.split(lengths), hidden.index_select(0, rows).split(counts))
    whole, answers = (torch.stack([part.float().mean(0) for part in each]) for each in parts)
    return whole, answers
