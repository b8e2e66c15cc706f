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

from ochat.data.held_out import is_held_out
from ochat.data.records import Record
from ochat.data.store_writer import Sequences
from ochat.data.weights import ROLES
from ochat.errors import DataError
from ochat.text import record_formats
from ochat.text.conversation import Conversation
from ochat.text.template import (
    Part,
    Span,
    Template,
    join,
)
from ochat.text.tokenizer import Tokenizer

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
class Side:
    """Conversations for one data set. `counts`: class -> kept, truncated, too_long, unsupervised, tokens, supervised"""

    sequences: Sequences = field(default_factory=Sequences)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass
class Encoded:
    """What became of a batch: for training and held out, and what is bad."""

    sides: tuple[Side, Side] = field(default_factory=lambda: (Side(), Side()))
    rejects: list[Reject] = field(default_factory=list)


class _LaidOut(NamedTuple):
    conversation: Conversation
    parts: list[Part]


@dataclass(frozen=True)
class Encoder:
    """Records in, sequences out. Called in worker processes, so it pickles."""

    tokenizer: Tokenizer
    template: Template
    format: str
    default_condition: str
    context: int
    over_long: OverLong
    held_out: float = 0.0  # share of the prompts

    def __call__(self, batch: list[Record]) -> Encoded:
        """Encode records. Bad ones become rejects; only over_long="error" raises (DataError)."""
        encoded = Encoded()
        laid_out = [self._lay_out(record) for record in batch]
        texts = self._texts([item.parts for item in laid_out if not isinstance(item, Reject)])
        for record, item in zip(batch, laid_out, strict=True):
            if isinstance(item, Reject):
                encoded.rejects.append(item)
                continue
            try:
                ids, spans = self._join(item.parts, texts)
            except DataError as error:
                encoded.rejects.append(_reject(record, str(error)))
                continue
            side = encoded.sides[is_held_out(item.conversation, self.held_out)]
            self._keep(side, record, item.conversation, ids, spans)
        return encoded

    def _lay_out(self, record: Record) -> _LaidOut | Reject:
        """The record as a conversation and its parts, of which only the texts are left to tokenise."""
        try:
            conversation = record_formats.convert(record.value(), self.format, self.default_condition)
            _check_numbers(conversation)
            self._check_condition(conversation.condition)
            return _LaidOut(conversation, self.template.parts(conversation, self.tokenizer))
        except DataError as error:
            return _reject(record, str(error))

    def _check_condition(self, condition: str) -> None:
        """A prefix's special tokens are live, and the condition stands in it. Raises DataError if it spells one."""
        if condition and self.template.condition_roles != "none":
            turns = self.tokenizer.split_at_specials(condition)
            if len(turns) > 1:
                raise DataError(f"condition: it spells the special token {turns[1]!r}; give the class another name")

    def _texts(self, layouts: list[list[Part]]) -> dict[str, list[int]]:
        """text -> its ids, all in one call of the library and each text once."""
        texts = list(dict.fromkeys(part.text for parts in layouts for part in parts))
        return dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))

    def _join(self, parts: list[Part], texts: dict[str, list[int]]) -> tuple[list[int], list[Span]]:
        """Ids and spans up to the last supervised token. Raises DataError if there is none."""
        ids, spans = join(parts, texts)
        spans = trim(spans)
        if num_supervised(spans) == 0:
            raise DataError("items: no message to learn from; every weight is 0, or there is no assistant message")
        return ids[: spans[-1].end], spans

    def _keep(self, side: Side, record: Record, conversation: Conversation, ids: list[int], spans: list[Span]) -> None:
        """Fit one sequence into the context, count it and append it."""
        count = side.counts.setdefault(conversation.condition, Counter())
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
        sequences = side.sequences
        sequences.input_ids.append(np.array(ids, np.uint32))
        sequences.span_ends.append([span.end for span in spans])
        sequences.span_roles.append([ROLE_IDS[span.role] for span in spans])
        sequences.span_weights.append([math.nan if span.weight is None else span.weight for span in spans])
        sequences.conditions.append(conversation.condition)
        sequences.rewards.append(math.nan if conversation.reward is None else conversation.reward)
        sequences.lines.append(record.line)
        sequences.files.append(record.file)


def trim(spans: list[Span]) -> list[Span]:
    """Without the trailing spans of weight 0."""
    end = len(spans)
    while end and not spans[end - 1].is_supervised:
        end -= 1
    return spans[:end]


def cut(spans: list[Span], context: int) -> list[Span]:
    """The first `context` tokens."""
    begins = [0, *(span.end for span in spans)]
    return [s._replace(end=min(s.end, context)) for s, begin in zip(spans, begins, strict=False) if begin < context]


def num_supervised(spans: list[Span]) -> int:
    """Tokens that are somebody's label with a weight other than 0; a sequence's first token is nobody's."""
    begins = [1, *(span.end for span in spans)]
    return sum(max(s.end - begin, 0) for s, begin in zip(spans, begins, strict=False) if s.is_supervised)


def _check_numbers(conversation: Conversation) -> None:
    """Raises DataError for a weight or reward that a shard's float32 would turn into infinity."""
    numbers = [("reward", conversation.reward)]
    numbers += [(f"items[{i}].weight", message.weight) for i, message in enumerate(conversation.items)]
    for name, number in numbers:
        if number is not None and abs(number) > FLOAT32_MAX:
            raise DataError(f"{name}: {number} is too large, the largest number is {FLOAT32_MAX:.3g}")


def _reject(record: Record, reason: str) -> Reject:
    text = record.data[: 4 * REJECT_CHARACTERS].decode("utf-8", "replace")[:REJECT_CHARACTERS]
    return Reject(record.file, record.line, reason.removeprefix(f"{record.place}: ")[:REJECT_CHARACTERS], text)
