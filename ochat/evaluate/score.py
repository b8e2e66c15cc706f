"""Score supervised tokens: what the model thinks of each, under chosen conditions.

    table = supervised_tokens(conversations, template)              # which tokens there are, of which records
    scores = measure(model, template, tokenizer, conversations, table, ["own", "GPT3"], advance)
    scores.sums(table.conversations, len(table.record_ids), 0)     # nll, entropy, mean rank, number of tokens

nll = -ln p(label) and entropy = -sum p ln p over the vocabulary, in nats; rank: logits greater than the label's, so 0
is the likeliest token. Passes are those of the swap matrix, so that the sums are what `ochat eval` measures.

Letters: S conversations, N supervised tokens, C conditions, R rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from ochat_kernels.reference_loss import rows_at_a_time, soft_cap, statistics_dtype
from torch import Tensor

from ochat.data.batch import Example, PackedBatch
from ochat.data.encode import cut, trim
from ochat.data.scores.record_ids import record_ids, split_id
from ochat.data.scores.token_file import checksum
from ochat.errors import ConfigError, DataError
from ochat.evaluate.held_out import HeldOut
from ochat.evaluate.swap import forward, packs
from ochat.model import linear
from ochat.model.transformer import Transformer
from ochat.text.template import Span, Template, check_condition
from ochat.text.tokenizer import Tokenizer

OWN, NONE = "own", "none"  # a conversation's own class, and no class
MESSAGES = ("user", "assistant", "tool")  # roles that are messages of a conversation


@dataclass(frozen=True, eq=False)
class SupervisedTokens:
    """The supervised tokens of S conversations, one after another, and where they came from."""

    record_ids: list[str]  # (S,)
    classes: list[str]  # (S,) of the conversations
    lengths: NDArray[np.int64]  # (S,) tokens, prompt included
    checksums: NDArray[np.int64]  # (S,) of all ids
    offsets: NDArray[np.int64]  # (S+1,) into the N tokens
    token_ids: NDArray[np.int32]  # (N,)
    messages: NDArray[np.int32]  # (N,) place of its message in the conversation, from 0
    class_ids: NDArray[np.int32]  # (N,) place in class_names of its message's class
    class_names: list[str]

    @property
    def conversations(self) -> NDArray[np.int64]:
        """(N,) the conversation of each token."""
        return np.repeat(np.arange(len(self.record_ids)), np.diff(self.offsets))


@dataclass(frozen=True, eq=False)
class Scores:
    """What is measured of N tokens under C conditions. NaN, and rank -1, where the context has no room for a token."""

    conditions: tuple[str, ...]
    nll: NDArray[np.float32]  # (C, N) nats
    entropy: NDArray[np.float32]  # (C, N) nats
    rank: NDArray[np.int32]  # (C, N)

    def sums(self, groups: NDArray[np.integer], count: int, condition: int) -> dict[str, NDArray]:
        """num_tokens, nll and entropy (sums in nats) and mean_rank of each of `count` groups, under one condition.
        `groups` (N,): of each token its group, from 0."""
        is_there = self.rank[condition] >= 0
        groups = groups[is_there]
        num_tokens = np.bincount(groups, minlength=count)

        def total(values: NDArray) -> NDArray:
            return np.bincount(groups, values[is_there], minlength=count)

        with np.errstate(invalid="ignore"):  # no token: no mean
            mean_rank = total(self.rank[condition]) / num_tokens
        nll, entropy = total(self.nll[condition]), total(self.entropy[condition])
        return {"num_tokens": num_tokens, "nll": nll, "entropy": entropy, "mean_rank": mean_rank}


def check_conditions(asked: Sequence[str], template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The conditions, each once; the conversation's own where none is asked for. Raises: ConfigError for one that no
    prefix can carry."""
    for name in asked:
        if name != OWN and template.condition_roles == "none":
            raise ConfigError(
                f"--condition {name}: the template {template.name} has none in its prefixes; leave it out"
            )
        check_condition(name, tokenizer, "--condition: ")
    return tuple(dict.fromkeys(asked or (OWN,)))


def supervised_tokens(conversations: Iterable[HeldOut], template: Template) -> SupervisedTokens:
    """Those of conversations as `ochat prepare` fits them into the template's context. One without any has none.

    Raises: DataError where there are none at all.
    """
    places, classes, lengths, sums, counts = [], [], [], [], []
    columns = [[np.zeros(0, np.int64)] for _ in range(3)]
    names: dict[str, int] = {}
    for each in conversations:
        spans = trim(cut(trim(each.spans), template.context))
        input_ids = each.input_ids[: spans[-1].end if spans else 0]
        file, line, _ = split_id(each.place)
        places.append((file, line))
        classes.append(each.condition)
        lengths.append(len(input_ids))
        sums.append(checksum(input_ids))
        of_spans = [each.condition if span.condition is None else span.condition for span in spans]
        numbers = np.array([names.setdefault(name, len(names)) for name in of_spans], np.int64)
        repeats = np.diff([0, *(span.end for span in spans)]).astype(np.int64)
        is_label = np.repeat(np.array([span.is_supervised for span in spans], np.bool_), repeats)
        is_label[:1] = False
        counts.append(np.count_nonzero(is_label))
        found = input_ids, np.repeat(_messages(spans), repeats), np.repeat(numbers, repeats)
        for column, values in zip(columns, found, strict=True):
            column.append(values[is_label])
    if not sum(counts):
        raise DataError("no conversation there has anything supervised within the context: there is nothing to score")
    offsets = np.cumsum([0, *counts], dtype=np.int64)
    tokens, messages, numbers = (np.concatenate(column).astype(np.int32) for column in columns)
    facts = np.array(lengths, np.int64), np.array(sums, np.int64), offsets
    return SupervisedTokens(record_ids(places), classes, *facts, tokens, messages, numbers, list(names))


def _messages(spans: Sequence[Span]) -> NDArray[np.int64]:
    """Of each span the place of its message in the conversation, from 0; -1 before the first. Spans of one role that
    follow each other are one message."""
    roles = [span.role for span in spans]
    begins = [role in MESSAGES and role != before for before, role in zip(["", *roles], roles, strict=False)]
    return np.cumsum(begins, dtype=np.int64) - 1


def measure(
    model: Transformer,
    template: Template,
    tokenizer: Tokenizer,
    conversations: Iterable[HeldOut],
    table: SupervisedTokens,
    conditions: Sequence[str],
    advance: Callable[[int], object] = lambda num_conversations: None,
) -> Scores:
    """The scores of `supervised_tokens(conversations)`; `conversations` are gone through once for each condition.

    Under all conditions the same tokens are measured: what the longest prefix pushes out of the context is not.
    Costs: a forward pass a condition; 12 bytes a token and condition; a chunk of logits at a time.
    """
    shape = len(conditions), len(table.token_ids)
    nll, entropy = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    rank = np.full(shape, -1, np.int32)
    for column in range(len(conditions)):
        examples = (written(each, conditions, template, tokenizer)[column] for each in conversations)
        for places, batch in packs(examples):
            counts = np.bincount(batch.supervised_classes.numpy(), minlength=len(places))
            at = np.concatenate([np.arange(n) + table.offsets[i] for i, n in zip(places, counts, strict=True)])
            assert (batch.supervised_labels.numpy() == table.token_ids[at]).all(), "the tokens of the table, in order"
            nll[column, at], entropy[column, at], rank[column, at] = rows(model, batch)
            advance(len(places))
    return Scores(tuple(conditions), nll, entropy, rank)


def written(each: HeldOut, conditions: Sequence[str], template: Template, tokenizer: Tokenizer) -> list[Example]:
    """The conversation under each condition, up to the last supervised token for which all of them, and its own, have
    room. Its own condition are the ids as they are: a message may have a class of its own."""
    spans = trim(cut(trim(each.spans), template.context))
    repeats = np.diff([0, *(span.end for span in spans)]).astype(np.int64)
    weights = np.repeat(np.array([span.own_weight for span in spans], np.float32), repeats)
    own = Example(each.input_ids[: len(weights)], weights, each.condition)
    found = [
        own if name == OWN else each.under(["" if name == NONE else name], template, tokenizer)[0]
        for name in conditions
    ]
    most = min(int(np.count_nonzero(example.loss_weights[1:])) for example in (own, *found))
    return [_first(example, most) for example in found]


def _first(example: Example, most: int) -> Example:
    """Up to the supervised label number `most`."""
    labels = np.flatnonzero(example.loss_weights[1:]) + 1
    end = int(labels[most - 1]) + 1 if most else 0
    return Example(example.input_ids[:end], example.loss_weights[:end], example.condition)


@torch.no_grad()
def rows(model: Transformer, batch: PackedBatch) -> tuple[NDArray, NDArray, NDArray]:
    """nll, entropy and rank (R,) of the supervised rows."""
    batch = batch.to(model.embed.weight.device)

    def head(hidden: Tensor, parameter: Tensor) -> list[Tensor]:
        weight, labels = linear.cast(parameter, hidden.dtype), batch.supervised_labels
        chunk = rows_at_a_time(weight.shape[0], hidden.is_cuda)
        parts = [
            token_statistics(F.linear(x, weight), y, model.config.logit_softcap)
            for x, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    nll, entropy, rank = (column.cpu().numpy() for column in forward(model, batch, head))
    return nll, entropy, rank


def token_statistics(logits: Tensor, labels: Tensor, cap: float) -> tuple[Tensor, Tensor, Tensor]:
    """nll and entropy (R,) fp32 in nats, and rank (R,) int64, of logits (R, V), which are used up, before the softcap,
    and labels (R,). In float64 for float64 logits. Costs: two chunks of fp32 logits."""
    z = soft_cap(logits.to(statistics_dtype(logits)), cap)
    lse, label = z.logsumexp(-1, keepdim=True), z.gather(1, labels[:, None])
    rank = (z > label).sum(-1)
    log_p = z.sub_(lse)
    return (lse - label).squeeze(1), -log_p.exp().mul_(log_p).sum(-1), rank
