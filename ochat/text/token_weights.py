"""Encode segments of text, and turn the roles and weights of their characters into those of tokens.

    for ids, spans in encode([template.segments(conversation, tokenizer)], tokenizer): ...

A token weighs the mean of its characters' weights: one that straddles two weights is trained in part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ochat.text.conversation import WeightedSpan, default_weight
from ochat.text.tokenizer import Tokenizer

ROLES = ("bos", "system", "prefix", "user", "assistant", "tool")  # a shard's span_roles are indices into it
ROLE_IDS = {role: number for number, role in enumerate(ROLES)}
MAX_WEIGHT = 1e30  # of a token: sums of millions of them times their losses stay within float32
DEFAULT_WEIGHTS = np.array([default_weight(role) for role in ROLES], np.float32)


class Span(NamedTuple):
    """A run of tokens: exclusive end, role (one of ROLES), the record's weight, the factor of --token-weights."""

    end: int
    role: str
    weight: float | None  # None: the record gives none
    condition: str | None = None  # of its message; None: the conversation's
    prefix: int = 0  # which prefix that carries a condition it is, from 1; 0: none
    factor: float = 1.0  # its token weight

    @property
    def own_weight(self) -> float:
        """The weight that the record gives, else the role's default, times the factor."""
        return (default_weight(self.role) if self.weight is None else self.weight) * self.factor

    @property
    def is_supervised(self) -> bool:
        """Whether its own weight is not 0 as a data set holds it, in float32."""
        return bool(np.float32(self.own_weight))


class Characters(NamedTuple):
    """Of each character of a text its role (index into ROLES), and its weight (NaN: the role's default)."""

    roles: NDArray[np.uint8]
    weights: NDArray[np.float32]

    def __getitem__(self, at: slice) -> Characters:  # type: ignore[override]
        return Characters(self.roles[at], self.weights[at])

    @classmethod
    def of(cls, length: int, role: str, weight: float | None, spans: Sequence[WeightedSpan] = ()) -> Characters:
        """Characters of one role and weight, but for `spans`."""
        weights = np.full(length, np.nan if weight is None else weight, np.float32)
        for span in spans:
            weights[span.start : span.end] = span.weight
        return cls(np.full(length, ROLE_IDS[role], np.uint8), weights)


class Segment(NamedTuple):
    """A span before its text is tokenised: the ids of `text`, encoded alone, then `ids`."""

    role: str
    weight: float | None
    text: str
    ids: tuple[int, ...] = ()
    characters: Characters | None = None  # of the text, where they differ
    is_live: bool = False  # special tokens in the text are special
    condition: str | None = None  # as Span has it, and `prefix`
    prefix: int = 0


def encode(conversations: Sequence[Sequence[Segment]], tokenizer: Tokenizer) -> list[tuple[list[int], list[Span]]]:
    """Ids and spans of each conversation; each plain text is encoded once. A segment without tokens has no span."""
    segments = [segment for each in conversations for segment in each]
    texts = list(dict.fromkeys(s.text for s in segments if s.characters is None and not s.is_live))
    plain = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    weighted: dict[tuple[str, bool], tuple[list[int], list[tuple[int, int]]]] = {}
    others = [s for s in segments if s.characters is not None or s.is_live]
    for is_live in {segment.is_live for segment in others}:
        texts = list(dict.fromkeys(s.text for s in others if s.is_live == is_live))
        found = tokenizer.encode_with_offsets(texts, specials=is_live)
        weighted |= {(text, is_live): each for text, each in zip(texts, found, strict=True)}
    return [_join(each, plain, weighted) for each in conversations]


def _join(
    segments: Iterable[Segment],
    plain: dict[str, list[int]],
    weighted: dict[tuple[str, bool], tuple[list[int], list[tuple[int, int]]]],
) -> tuple[list[int], list[Span]]:
    ids: list[int] = []
    spans: list[Span] = []
    for segment in segments:
        begin = len(ids)
        if segment.characters is None:
            ids += plain[segment.text] if segment.text else ()
        else:
            own, offsets = weighted[segment.text, segment.is_live]
            found = token_spans(offsets, *segment.characters, text=segment.text if segment.is_live else "")
            spans += [span._replace(end=begin + span.end, condition=segment.condition) for span in found]
            ids += own
            begin = len(ids)
        ids += segment.ids
        if len(ids) > begin:
            spans.append(Span(len(ids), segment.role, segment.weight, segment.condition, segment.prefix))
    return ids, spans


def token_spans(
    offsets: Sequence[tuple[int, int]], roles: NDArray[np.uint8], weights: NDArray[np.float32], *, text: str = ""
) -> list[Span]:
    """Runs of tokens of one role and weight, in order.

    `offsets`: the characters of each token; one without characters is taken with the character that follows.
    `roles` (indices into ROLES), `weights` (NaN: the role's default): of each character. `text`: those characters, if
    a chat template wrote them: of several tokens for a blank that ends a run, as SentencePiece has for a newline, only
    the first is part of it, as in transformers' masks.
    """
    if not offsets:
        return []
    starts, ends = np.array(offsets, np.int64).T
    starts = np.minimum(starts, len(roles) - 1)
    ends = np.maximum(ends, starts + 1)
    same_weight = (weights[1:] == weights[:-1]) | (np.isnan(weights[1:]) & np.isnan(weights[:-1]))
    changes = np.concatenate([[0], np.cumsum((roles[1:] != roles[:-1]) | ~same_weight)])
    token_roles, token_weights = roles[starts], weights[starts]
    for token in np.flatnonzero(changes[starts] != changes[ends - 1]):
        characters = slice(starts[token], ends[token])
        own = np.where(np.isnan(weights[characters]), DEFAULT_WEIGHTS[roles[characters]], weights[characters])
        token_roles[token] = roles[characters][np.abs(own).argmax()]
        token_weights[token] = own.mean(dtype=np.float64)
    again = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1])
    for token in np.flatnonzero(again) + 1 if text else ():
        after = ends[token]
        if text[after - 1].isspace() and (after == len(changes) or changes[after] != changes[after - 1]):
            token_roles[token], token_weights[token] = ROLE_IDS["prefix"], np.nan
    is_last = np.ones(len(starts), bool)
    is_last[:-1] = (token_roles[1:] != token_roles[:-1]) | ~(
        (token_weights[1:] == token_weights[:-1]) | (np.isnan(token_weights[1:]) & np.isnan(token_weights[:-1]))
    )
    return [
        Span(int(i) + 1, ROLES[token_roles[i]], None if np.isnan(token_weights[i]) else float(token_weights[i]))
        for i in np.flatnonzero(is_last)
    ]
