"""One record at a time: parse, read as a conversation, tokenise, fit into the context. What prepare's workers do.

    encoded = Encoder(tokenizer, template, "auto", "", 4096, "truncate")(batch_of_records)

Order of fitting: trailing tokens of weight 0 go (nothing is learnt after them), what is still too long is cut on
the right, trailing tokens of weight 0 go again. Weights here are the record's own, or the role's default.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ochat.data import importers
from ochat.data.conversation import Conversation, default_weight
from ochat.data.records import Record
from ochat.data.shards import Columns
from ochat.data.template import Span, Template
from ochat.data.tokenizer import Tokenizer
from ochat.data.weights import ROLES
from ochat.errors import DataError

OverLong = Literal["truncate", "drop", "error"]
REJECT_CHARACTERS = 2000
FLOAT32_MAX = float(np.finfo(np.float32).max)
ROLE_IDS = {role: number for number, role in enumerate(ROLES)}


class Reject(NamedTuple):
    """A bad record, as rejects.jsonl holds it."""

    file: str
    line: int
    reason: str
    text: str  # its first characters


@dataclass
class Encoded:
    """What became of a batch. `counts` per class: kept, truncated, too_long, unsupervised, tokens, supervised."""

    columns: Columns = field(default_factory=Columns)
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder:
    """Records in, sequences out. Called in worker processes, so it pickles."""

    tokenizer: Tokenizer
    template: Template
    format: str
    default_condition: str
    context: int
    over_long: OverLong

    def __call__(self, batch: list[Record]) -> Encoded:
        """Encode records. Bad ones become rejects; only over_long="error" raises (DataError)."""
        encoded = Encoded()
        for record in batch:
            try:
                ids, spans, condition, reward = self._encode(record)
            except DataError as error:
                encoded.rejects.append(_reject(record, str(error)))
                continue
            self._keep(encoded, record, ids, spans, condition, reward)
        return encoded

    def _encode(self, record: Record) -> tuple[list[int], list[Span], str, float]:
        """Ids and spans up to the last supervised token, class and reward (NaN: none). Raises DataError."""
        conversation = importers.convert(record.value(), self.format, self.default_condition)
        _check_numbers(conversation)
        ids, spans = self.template.encode_spans(conversation, self.tokenizer)
        spans = trim(spans)
        if num_supervised(spans) == 0:
            raise DataError("items: no message to learn from; every weight is 0, or there is no assistant message")
        reward = math.nan if conversation.reward is None else conversation.reward
        return ids[: spans[-1].end], spans, conversation.condition, reward

    def _keep(
        self, encoded: Encoded, record: Record, ids: list[int], spans: list[Span], condition: str, reward: float
    ) -> None:
        """Fit one sequence into the context, count it and append it."""
        count = encoded.counts.setdefault(condition, Counter())
        if len(ids) > self.context:
            if self.over_long == "error":
                raise DataError(
                    f"{record.place}: {len(ids)} tokens, the context is {self.context}: raise --context, or choose "
                    "--over-long truncate or drop"
                )
            if self.over_long == "drop":
                count["too_long"] += 1
                return
            spans = trim(cut(spans, self.context))
            if num_supervised(spans) == 0:
                count["unsupervised"] += 1
                return
            ids = ids[: spans[-1].end]
            count["truncated"] += 1
        count.update(kept=1, tokens=len(ids), supervised=num_supervised(spans))
        columns = encoded.columns
        columns.input_ids.append(np.array(ids, np.uint32))
        columns.span_ends.append([span.end for span in spans])
        columns.span_roles.append([ROLE_IDS[span.role] for span in spans])
        columns.span_weights.append([math.nan if span.weight is None else span.weight for span in spans])
        columns.conditions.append(condition)
        columns.rewards.append(reward)
        columns.lines.append(record.line)
        columns.files.append(record.file)


def trim(spans: list[Span]) -> list[Span]:
    """Without the trailing spans of weight 0."""
    end = len(spans)
    while end and own_weight(spans[end - 1]) == 0:
        end -= 1
    return spans[:end]


def cut(spans: list[Span], context: int) -> list[Span]:
    """The first `context` tokens."""
    begins = [0, *(span.end for span in spans)]
    return [s._replace(end=min(s.end, context)) for s, begin in zip(spans, begins, strict=False) if begin < context]


def num_supervised(spans: list[Span]) -> int:
    """Tokens that are somebody's label with a weight other than 0; a sequence's first token is nobody's."""
    begins = [1, *(span.end for span in spans)]
    return sum(max(s.end - begin, 0) for s, begin in zip(spans, begins, strict=False) if own_weight(s) != 0)


def own_weight(span: Span) -> float:
    """The record's weight of a span, or its role's default."""
    return default_weight(span.role) if span.weight is None else float(np.float32(span.weight))


def _check_numbers(conversation: Conversation) -> None:
    """Raises DataError for a weight or reward that a shard's float32 would turn into infinity."""
    numbers = [("reward", conversation.reward)]
    numbers += [(f"items[{i}].weight", message.weight) for i, message in enumerate(conversation.items)]
    for name, number in numbers:
        if number is not None and abs(number) > FLOAT32_MAX:
            raise DataError(f"{name}: {number} is too large, the largest number is {FLOAT32_MAX:.3g}")


def _reject(record: Record, reason: str) -> Reject:
    text = record.data[: 4 * REJECT_CHARACTERS].decode("utf-8", "replace")[:REJECT_CHARACTERS]
    return Reject(record.file, record.line, reason.removeprefix(f"{record.place}: "), text)
