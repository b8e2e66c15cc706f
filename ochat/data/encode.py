"""Encode records: parse, read as a conversation, tokenise, fit into the context. What prepare's workers do.

    encoded = Encoder(tokenizer, template, "auto", "", 4096, "truncate")(batch_of_records)

Fitting: trailing tokens of weight 0 are removed (nothing is learnt after them), what is still too long is cut on the
right, and trailing tokens of weight 0 are removed again. Weights here are the record's own, or the role's default.

A share of the prompts can be held out for evaluation. A hash of the prompt alone decides (the system text and the first
user message, or the first message if there is none, without surrounding blanks), so all answers to a prompt are on the
same side, on every machine and in every order of the input; what a small share holds out, a larger one holds out too.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from ochat.data.readers import Record
from ochat.data.rejected import Reject, attempt
from ochat.data.store_writer import Sequences
from ochat.data.weights import ROLES
from ochat.errors import DataError
from ochat.text import record_formats
from ochat.text.conversation import Conversation
from ochat.text.template import Segment, Span, Template, join
from ochat.text.tokenizer import Tokenizer

OverLong = Literal["truncate", "drop", "error"]
FLOAT32_MAX = float(np.finfo(np.float32).max)
ROLE_IDS = {role: number for number, role in enumerate(ROLES)}


@dataclass
class Split:
    """Conversations of one data set. `counts`: class -> kept, truncated, too_long, unsupervised, tokens, supervised."""

    sequences: Sequences = field(default_factory=Sequences)
    counts: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass
class Encoded:
    """What became of a batch: sequences for training and held out, and bad records."""

    splits: tuple[Split, Split] = field(default_factory=lambda: (Split(), Split()))
    rejects: list[Reject] = field(default_factory=list)


class _Layout(NamedTuple):
    conversation: Conversation
    segments: list[Segment]


class _Joined(NamedTuple):
    conversation: Conversation
    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Encoder:
    """Records in, sequences out. Called in worker processes, so it can be pickled."""

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
        layouts = [attempt(record, self._lay_out, record) for record in batch]
        texts = self._encode_texts([layout for layout in layouts if isinstance(layout, _Layout)])
        for record, layout in zip(batch, layouts, strict=True):
            joined = layout if isinstance(layout, Reject) else attempt(record, _join, layout, texts)
            if isinstance(joined, Reject):
                encoded.rejects.append(joined)
            else:
                self._keep(encoded, record, joined)
        return encoded

    def _lay_out(self, record: Record) -> _Layout:
        """The record as a conversation and its segments, of which only the texts are left to tokenise."""
        conversation = record_formats.convert(record.value(), self.format, self.default_condition)
        _check_numbers(conversation)
        self._check_condition(conversation.condition)
        return _Layout(conversation, self.template.segments(conversation, self.tokenizer))

    def _check_condition(self, condition: str) -> None:
        """Raises DataError if the condition spells a special token: the prefix that holds it is encoded with them."""
        if condition and self.template.condition_roles != "none":
            turns = self.tokenizer.split_at_specials(condition)
            if len(turns) > 1:
                raise DataError(f"condition: it spells the special token {turns[1]!r}; give the class another name")

    def _encode_texts(self, layouts: list[_Layout]) -> dict[str, list[int]]:
        """text -> its ids, all in one call of the library and each text once."""
        texts = list(dict.fromkeys(segment.text for layout in layouts for segment in layout.segments))
        return dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))

    def _keep(self, encoded: Encoded, record: Record, joined: _Joined) -> None:
        """Fit one sequence into the context, count it and append it to its split."""
        conversation, ids, spans = joined
        split = encoded.splits[is_held_out(conversation, self.held_out)]
        count = split.counts.setdefault(conversation.condition, Counter())
        if len(ids) > self.context:
            if self.over_long == "error":
                raise DataError(
                    f"{record.location}: {len(ids)} tokens, the context is {self.context}: raise --context, or choose "
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
        sequences = split.sequences
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
    """Tokens that are a label with a weight other than 0; the first token of a sequence is never a label."""
    begins = [1, *(span.end for span in spans)]
    return sum(max(s.end - begin, 0) for s, begin in zip(spans, begins, strict=False) if s.is_supervised)


def is_held_out(conversation: Conversation, share: float) -> bool:
    """True for about `share` (0 to 1) of all prompts."""
    return share > 0 and prompt_position(conversation) < share


def prompt_position(conversation: Conversation) -> float:
    """A number from 0 to 1 that the prompt alone decides, uniform over prompts."""
    users = (message for message in conversation.items if message.role == "user")
    first = next(users, conversation.items[0]).content.strip()
    system = conversation.system.strip()
    prompt = f"{len(system)} {system}{first}".encode()  # the length keeps ("ab", "c") and ("a", "bc") apart
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest()) / 2**64


def _join(layout: _Layout, texts: dict[str, list[int]]) -> _Joined:
    """Ids and spans up to the last supervised token. Raises DataError if there is none."""
    ids, spans = join(layout.segments, texts)
    spans = trim(spans)
    if num_supervised(spans) == 0:
        raise DataError("items: no message to learn from; every weight is 0, or there is no assistant message")
    return _Joined(layout.conversation, ids[: spans[-1].end], spans)


def _check_numbers(conversation: Conversation) -> None:
    """Raises DataError for a weight or reward that the store's float32 would turn into infinity."""
    numbers = [("reward", conversation.reward)]
    numbers += [(f"items[{i}].weight", message.weight) for i, message in enumerate(conversation.items)]
    for name, number in numbers:
        if number is not None and abs(number) > FLOAT32_MAX:
            raise DataError(f"{name}: {number} is too large, the largest number is {FLOAT32_MAX:.3g}")
