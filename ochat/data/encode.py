"""Encode records, here or in a pool of processes: parse, read as a conversation, tokenise, fit into the context.

    encoder = Encoder(tokenizer, template, RecordReader(), 4096, "truncate")
    for encoded, position in encode_all(readers.batches(files), encoder, num_workers=2): ...

Fitting: trailing tokens of weight 0 are removed (nothing is learnt after them), what is still too long is cut on the
right, and trailing tokens of weight 0 are removed again. Weights here are the record's own, or the role's default.
Token weights multiply those of what is then left, and trailing tokens of weight 0 are removed once more. Held-out
conversations get none: they measure every supervised token.

A share of the prompts can be held out for evaluation. A hash of the prompt alone decides (the system text and the first
user message, or the first message if there is none, without surrounding blanks), so all answers to a prompt are on the
same side, on every machine and in every order of the input; what a small share holds out, a larger one holds out too.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ochat.data.readers import Batch
from ochat.data.records import Record
from ochat.data.rejected import Reject, refuse
from ochat.data.scores.rewards import Rewards
from ochat.data.scores.token_file import TokenWeights
from ochat.data.store_writer import Sequences
from ochat.errors import DataError
from ochat.text import rendered_prefixes, token_weights
from ochat.text.class_names import check_class_name
from ochat.text.conversation import Conversation
from ochat.text.record_formats import RecordReader, is_empty_answer
from ochat.text.records.objects import Notes
from ochat.text.rendered_prefixes import Slots
from ochat.text.template import Template
from ochat.text.token_weights import MAX_WEIGHT, ROLE_IDS, Segment, Span
from ochat.text.tokenizer import Tokenizer

OverLong = Literal["truncate", "drop", "error"]
FLOAT32_MAX = float(np.finfo(np.float32).max)
# what is noted of conversations that are kept
EMPTY, SPECIAL = "an empty answer", "a special token in their text, read as ordinary text"
UNKNOWN, LOST = "letters that the tokenizer does not know", "answers that the context cut off"
BEYOND = "more tokens than the base was trained on ({:,}, its max_position_embeddings)"
UNTHOUGHT = "reasoning that the template leaves out; --reasoning all writes it"


@dataclass
class Split:
    """Conversations of one data set. `counts`: (class, what) -> how many are kept, truncated, too_long, unsupervised,
    or how many of their tokens are kept and supervised."""

    sequences: Sequences = field(default_factory=Sequences)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass
class Encoded:
    """What became of a batch: sequences for training and held out, bad records, and what else is worth a word.

    `ignored`: metadata keys -> how often they come. `noted`: what was kept, but lost something -> how many records.
    """

    splits: tuple[Split, Split] = field(default_factory=lambda: (Split(), Split()))
    rejects: list[Reject] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    mapped: set[str] = field(default_factory=set)  # columns that the map names, and records have
    letters: int = 0  # counted only for a tokenizer that does not spell all of them
    unknown_letters: int = 0
    bound: str = ""  # the first record in which the ids of another class cannot be exchanged, and why


Encode = Callable[[list[Record]], Encoded]  # an Encoder: it pickles


class _Layout(NamedTuple):
    conversation: Conversation
    segments: list[Segment]
    is_unthought: bool  # the template leaves out reasoning by its own rules
    slots: Slots | None  # where a rendered text carries its class


@dataclass(frozen=True)
class Encoder:
    """Records in, sequences out. Called in worker processes, so it can be pickled."""

    tokenizer: Tokenizer
    template: Template
    reader: RecordReader
    context: int
    over_long: OverLong
    held_out: float = 0.0  # share of the prompts
    ignores_conditions: bool = False  # a class that no prefix carries is no fault
    token_weights: TokenWeights | None = None
    rewards: Rewards | None = None  # in place of the records' own
    trained_context: int | None = None  # the base's, in tokens

    @cached_property
    def _named(self) -> frozenset[str]:
        return self.reader.map.named()

    def __call__(self, batch: list[Record]) -> Encoded:
        """Encode records. Bad ones become rejects; only over_long="error" raises (DataError)."""
        encoded, order = Encoded(), {(record.file, record.line): i for i, record in enumerate(batch)}
        layouts: list[tuple[Record, _Layout]] = []
        for record in batch:
            try:
                layouts += [(record, layout) for layout in self._lay_out(record, encoded)]
            except DataError as error:
                encoded.rejects.append(refuse(record, str(error)))
        joined = token_weights.encode([layout.segments for _, layout in layouts], self.tokenizer)
        for (record, layout), (ids, spans) in zip(layouts, joined, strict=True):
            spans = trim(spans)
            if num_supervised(spans):
                self._note(encoded, layout)
                spans = self._numbered(encoded, record, layout, ids, spans)
                self._keep(encoded, record, layout.conversation, ids[: spans[-1].end], spans)
            else:
                why = "items: no message to learn from; every weight is 0, or there is no assistant message"
                encoded.rejects.append(refuse(record, why))
        # in the order of the records
        encoded.rejects.sort(key=lambda reject: order[reject.file, reject.line])
        return encoded

    def _lay_out(self, record: Record, encoded: Encoded) -> list[_Layout]:
        """The record's conversations and their segments, of which only the texts are left to tokenise."""
        is_put = self.rewards and self.reader.reward_text  # classes are made of rewards
        notes, value = Notes(), self.rewards.put(record) if self.rewards and is_put else record.value()
        if self._named and isinstance(value, dict):
            encoded.mapped |= self._named & value.keys()
        conversations = self.reader.read(value, notes, record.condition)
        if self.rewards:
            given = self.rewards.of(record.file, record.line, len(conversations))
            conversations = [replace(each, reward=reward) for each, reward in zip(conversations, given, strict=True)]
        layouts = []
        for conversation in conversations:
            _check_numbers(conversation)
            for place, condition in conversation.conditions.items():
                self._check_condition(condition, place)
            conversation = self.template.with_thoughts_apart(conversation)
            segments = self.template.segments(conversation, self.tokenizer)
            written = self._without_lost_reasoning(conversation)
            is_unthought = self.template.reasoning == "template" and written is not conversation
            slots = self._slots(encoded, record, conversation, segments)
            layouts.append(_Layout(written, segments, is_unthought, slots))
        if notes.ignored:
            encoded.ignored.update(notes.ignored)
        return layouts

    def _slots(
        self, encoded: Encoded, record: Record, conversation: Conversation, segments: list[Segment]
    ) -> Slots | None:
        """Where a rendered text carries its class, as long as the prefixes of the data can be exchanged."""
        if encoded.bound or self.template.tokenize != "rendered" or self.template.condition_roles == "none":
            return None
        try:
            return rendered_prefixes.slots(self.template, self.tokenizer, conversation, segments)
        except DataError as error:
            encoded.bound = f"{record.location}: {error}"
            return None

    def _numbered(
        self, encoded: Encoded, record: Record, layout: _Layout, ids: list[int], spans: list[Span]
    ) -> list[Span]:
        """The spans with the numbers of the prefixes in a rendered text."""
        if encoded.bound or layout.slots is None:
            return spans
        try:
            return rendered_prefixes.numbered(self.template, self.tokenizer, layout.slots, ids, spans)
        except DataError as error:
            encoded.bound = f"{record.location}: {error}"
            return spans

    def _check_condition(self, condition: str, place: str) -> None:
        """Raises: DataError for a name that no class may have, and for one that the template's prefixes cannot
        carry."""
        check_class_name(condition, place)
        if condition and self.template.condition_roles == "none" and not self.ignores_conditions:
            raise DataError(
                f"{place}: the template {self.template.name} writes no class; choose another, or train without "
                "it with --conditions ignore"
            )
        if condition and self.template.condition_roles != "none":
            turns = self.tokenizer.split_at_specials(condition)  # as the prefix that holds it is encoded
            if len(turns) > 1:
                raise DataError(f"{place}: it spells the special token {turns[1]!r}; give the class another name")

    def _without_lost_reasoning(self, conversation: Conversation) -> Conversation:
        """The conversation without reasoning that the template leaves out. Raises: DataError for an answer that is
        empty by then, unless empty ones are kept."""
        if not any(message.reasoning for message in conversation.items):
            return conversation
        written = self.template.without_lost_reasoning(conversation)
        if written == conversation:
            return conversation
        empty = [i for i, message in enumerate(written.items) if is_empty_answer(message)]
        if empty and self.reader.empty_answers == "refuse":
            raise DataError(
                f"items[{empty[0]}]: an empty answer without its reasoning, which the template leaves out; or "
                "--empty-answers keep"
            )
        return written

    def _note(self, encoded: Encoded, layout: _Layout) -> None:
        """Count what users would want to know of a conversation that is kept."""
        if self.reader.empty_answers == "keep" and any(map(is_empty_answer, layout.conversation.items)):
            encoded.noted[EMPTY] += 1
        texts = _texts(layout.conversation)
        if any(map(self.tokenizer.spells_special, texts)):
            encoded.noted[SPECIAL] += 1
        if layout.is_unthought:
            encoded.noted[UNTHOUGHT] += 1
        if not self.tokenizer.spells_all:
            lost = self.tokenizer.count_unknown(texts)
            encoded.unknown_letters += lost
            encoded.letters += sum(map(len, texts))
            if lost:
                encoded.noted[UNKNOWN] += 1

    def _keep(
        self, encoded: Encoded, record: Record, conversation: Conversation, ids: list[int], spans: list[Span]
    ) -> None:
        """Fit one sequence into the context, weigh its tokens, count it and append it to its split."""
        held_out = is_held_out(conversation, self.held_out)
        split, name = encoded.splits[held_out], conversation.condition
        spans, what = self._fit(record, spans)
        if what in ("truncated", "unsupervised"):
            encoded.noted[LOST] += 1
        sequences = split.sequences
        if spans and self.token_weights and not held_out:
            try:
                spans = self._weigh(self.token_weights, record, ids, spans)
            except DataError as error:
                encoded.rejects.append(refuse(record, str(error)))
                return
            what = what if spans else "unsupervised"
        if what:
            split.counts[name, what] += 1
        if not spans:
            return
        if self.token_weights and not held_out:
            sequences.span_factors.append([span.factor for span in spans])
        ids = ids[: spans[-1].end]
        if self.trained_context and len(ids) > self.trained_context:
            encoded.noted[BEYOND.format(self.trained_context)] += 1
        split.counts.update({(name, "kept"): 1, (name, "tokens"): len(ids)})
        split.counts.update({(of, "supervised"): count for of, count in supervised_by_class(spans, name).items()})
        sequences.input_ids.append(np.array(ids, np.uint32))
        sequences.span_ends.append([span.end for span in spans])
        sequences.span_roles.append([ROLE_IDS[span.role] for span in spans])
        sequences.span_weights.append([math.nan if span.weight is None else span.weight for span in spans])
        sequences.span_conditions.append([name if span.condition is None else span.condition for span in spans])
        sequences.span_prefixes.append([span.prefix for span in spans])
        sequences.conditions.append(name)
        sequences.rewards.append(math.nan if conversation.reward is None else conversation.reward)
        sequences.lines.append(record.line)
        sequences.files.append(record.file)

    def _fit(self, record: Record, spans: list[Span]) -> tuple[list[Span], str]:
        """The spans within the context, [] for none, and a name of the counts for what did not fit as it was."""
        if spans[-1].end <= self.context:
            return spans, ""
        if self.over_long == "error":
            raise DataError(
                f"{record.location}: {spans[-1].end} tokens, the context is {self.context}: raise --context, or choose "
                "--over-long truncate or drop"
            )
        if self.over_long == "drop":
            return [], "too_long"
        spans = trim(cut(spans, self.context))
        return (spans, "truncated") if num_supervised(spans) else ([], "unsupervised")

    def _weigh(self, given: TokenWeights, record: Record, ids: list[int], spans: list[Span]) -> list[Span]:
        """The spans with the weights of their tokens, up to the last that is not 0; [] where all are. Raises:
        DataError."""
        fitted = np.array(ids[: spans[-1].end])
        spans = trim(multiplied(spans, given.of(record.file, record.line, fitted, num_supervised(spans))))
        return spans if num_supervised(spans) else []


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


def multiplied(spans: list[Span], weights: NDArray[np.float32]) -> list[Span]:
    """The spans cut into runs of one token weight. `weights`: (num_supervised(spans),), of the labels in order; the
    first token, which is no label, goes with the next."""
    found: list[Span] = []
    begin, used = 0, 0
    for span in spans:
        first, begin = max(begin, 1), span.end
        if not span.is_supervised or span.end <= first:
            found.append(span)
            continue
        factors = weights[used : used + span.end - first]
        used += len(factors)
        ends = np.append(np.flatnonzero(factors[1:] != factors[:-1]) + 1, len(factors))
        found += [span._replace(end=first + int(end), factor=float(factors[end - 1])) for end in ends]
    return found


def num_supervised(spans: list[Span]) -> int:
    """Tokens that are a label with a weight other than 0; the first token of a sequence is never a label."""
    return sum(supervised_by_class(spans, "").values())


def supervised_by_class(spans: list[Span], condition: str) -> Counter[str]:
    """The same by class; `condition`: the conversation's."""
    begins, counts = [1, *(span.end for span in spans)], Counter[str]()
    for span, begin in zip(spans, begins, strict=False):
        name = condition if span.condition is None else span.condition
        counts[name] += max(span.end - begin, 0) if span.is_supervised else 0
    return counts


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


def _texts(conversation: Conversation) -> list[str]:
    """All that a conversation says."""
    texts = [conversation.system, *(message.content for message in conversation.items)]
    texts += [message.reasoning for message in conversation.items if message.reasoning]
    calls = [call for message in conversation.items for call in message.tool_calls]
    if calls or conversation.tools:
        texts.append(json.dumps([calls, conversation.tools], ensure_ascii=False))
    return texts


def _check_numbers(conversation: Conversation) -> None:
    """Raises DataError for a reward that the store's float32 would turn into infinity, and for a weight that is too
    large to train with."""
    numbers = [("reward", conversation.reward, FLOAT32_MAX)]
    for i, message in enumerate(conversation.items):
        weights = (message.weight, *(span.weight for span in message.spans))
        numbers += [(f"items[{i}].weight", weight, MAX_WEIGHT) for weight in weights]
    for name, number, most in numbers:
        if number is not None and abs(number) > most:
            raise DataError(f"{name}: {number} is too large, the largest number is {most:.3g}")


def encode_all(batches: Iterable[Batch], encoder: Encode, num_workers: int) -> Iterator[tuple[Encoded, int]]:
    """Encoded batches in the order of their records, a few of them at a time; 0 workers: in this process.

    Raises DataError if a worker dies, naming its records.
    """
    if num_workers == 0:
        for batch, position in batches:
            yield encoder(batch), position
        return
    # spawn: a fork would copy the locks of this process's threads in an unknown state
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (encoder,))
    waiting: deque[tuple[Future[Encoded], Batch]] = deque()
    try:
        for batch in batches:
            waiting.append((pool.submit(_encode, batch[0]), batch))
            if len(waiting) > 3 * num_workers:  # enough to keep all workers busy, few enough to stay small
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Encoded], batch: Batch) -> tuple[Encoded, int]:
    records, position = batch
    try:
        return future.result(), position
    except BrokenProcessPool as error:
        raise DataError(
            f"{records[0].location}: a worker died on this record or one of the {len(records) - 1} after it, mostly "
            "for lack of memory: try --workers 0, which needs the least"
        ) from error


_worker_encoder: Encode


def _start_worker(encoder: Encode) -> None:
    global _worker_encoder  # a worker process has one encoder, and pickling it per batch would cost more than the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _worker_encoder = encoder


def _encode(batch: list[Record]) -> Encoded:
    return _worker_encoder(batch)
