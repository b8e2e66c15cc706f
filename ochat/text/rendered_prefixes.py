"""Find where the text that a chat template renders carries the class, and whether its ids can be exchanged there alone.

    ids(template, tokenizer, "GPT4")                            # of "GPT4 user", of "GPT4 assistant"
    found = slots(template, tokenizer, conversation, segments)  # where they are among the texts between special tokens
    spans = numbered(template, tokenizer, found, ids, spans)    # with Span.prefix

The text between two special tokens is tokenised alone. Where it changes with the class, the prefix ends behind the word
that the class belongs to, before a character that the template always writes there, or a special token: "GPT4 user"
before a newline. Its ids may be exchanged if no token crosses that end. So it is checked that

- under every class, messages that begin with anything that pre-tokenizers tell apart have the prefix's ids in front of
  them, and for the rest the ids that they have without a class (`check`);
- every conversation of the data, written without its class, differs in these prefixes alone (`slots`), and has their
  ids at each of them (`numbered`).

Each raises DataError with the reason where that is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from os.path import commonprefix
from typing import NamedTuple

from ochat.errors import DataError
from ochat.text.chat.plain import NUM_PREFIXES
from ochat.text.conversation import Conversation, Message
from ochat.text.template import Template
from ochat.text.token_weights import Segment, Span
from ochat.text.tokenizer import Tokenizer

ASKED, ANSWERED, CLASS = "Qq7", "Aa8", "Cc9"  # what probes say; no template holds it
OTHER_SPECIALS = "the tokenizer finds other special tokens in the text than it spells"
MAX_CLASSES = 4096  # whose prefixes are kept
BEGINNINGS = (  # of messages, which a tokenizer might join with what stands in front
    "x", "", " ", "\n", "\n\nx", " x", "  x", " \n x", "\tx", "\r\nx", "X", "xyz", "1", "42", "'s", "'T", ":", ".",
    "?!", "_x", "-x", "/", "(", "\u0301a", "\u00e9", "\u00a0x", "\u2028", "\u2581x", "\u6f22", "\u0645", "\U0001f600",
    "\u200dx",
)  # fmt: skip


class Prefix(NamedTuple):
    """A text that carries the class."""

    text: str  # "GPT4 user"
    plain: str  # the same without a class: "user"
    behind: str  # the character that always follows; "": a special token does
    special: str  # the token in front


class Slots(NamedTuple):
    """Where a conversation carries its class."""

    condition: str
    num_texts: int  # between special tokens
    numbers: dict[int, int]  # of those that begin with a prefix: place -> number of the prefix, from 1


def ids(template: Template, tokenizer: Tokenizer, condition: str) -> list[list[int]]:
    """The ids of each prefix under a class; "": without one."""
    prefixes = _prefixes_of(template, tokenizer, condition)
    texts = [each.special + (each.text if condition else each.plain) for each in prefixes]
    return [found[1:] for found, _ in tokenizer.encode_with_offsets(texts, specials=True)]


def check(template: Template, tokenizer: Tokenizer, condition: str) -> None:
    """Under a class, no token holds the end of a prefix and what stands behind it, whatever messages say."""
    said = [Message(role, text) for text in BEGINNINGS for role in ("user", "assistant")]
    texts = [template.render(Conversation(tuple(said), each)) for each in (condition, "")]
    with_class, plain = (tokenizer.split_at_specials(text)[::2] for text in texts)
    found = _numbers(with_class, plain, _prefixes_of(template, tokenizer, condition))
    ours, theirs = (_between(tokenizer, each) for each, _ in tokenizer.encode_with_offsets(texts, specials=True))
    if not len(ours) == len(theirs) == len(plain):
        raise DataError(OTHER_SPECIALS)
    firsts, others = ids(template, tokenizer, condition), ids(template, tokenizer, "")
    for place, (own, without) in enumerate(zip(ours, theirs, strict=True)):
        number = found.get(place)
        first, other = (firsts[number - 1], others[number - 1]) if number else ([], [])
        if own[: len(first)] != first or without != other + own[len(first) :]:
            raise _crossing(condition)


def slots(template: Template, tokenizer: Tokenizer, conversation: Conversation, segments: Sequence[Segment]) -> Slots:
    """Where the conversation, whose segments these are, carries its class."""
    own = conversation.condition
    other = replace(conversation, condition="" if own else CLASS)
    ours = _texts(segments, tokenizer)
    if any(segment.is_live for segment in segments):
        theirs = tokenizer.split_at_specials(template.render(other))[::2]
    else:  # it spells a special token, which is text
        theirs = _texts(template.segments(other, tokenizer), tokenizer)
    with_class, plain = (ours, theirs) if own else (theirs, ours)
    prefixes = _prefixes_of(template, tokenizer, own or CLASS)
    return Slots(own, len(ours), _numbers(with_class, plain, prefixes))


def numbered(
    template: Template, tokenizer: Tokenizer, found: Slots, input_ids: Sequence[int], spans: Sequence[Span]
) -> list[Span]:
    """The spans, of which those that carry the class have the numbers of their prefixes. `input_ids`: of the whole
    conversation, of which the spans may leave out the end."""
    prefixes, specials = ids(template, tokenizer, found.condition), set(tokenizer.special_tokens.values())
    begins = [0, *(at + 1 for at, each in enumerate(input_ids) if each in specials)]
    if len(begins) != found.num_texts:
        raise DataError(OTHER_SPECIALS)
    places = []
    for place, number in found.numbers.items():
        start, expected = begins[place], prefixes[number - 1]
        end = start + len(expected)
        if list(input_ids[start:end]) != expected:
            raise _crossing(found.condition)
        places.append((start, end, number))
    return _cut_out(spans, places)


def _cut_out(spans: Sequence[Span], places: Sequence[tuple[int, int, int]]) -> list[Span]:
    """The spans with one of its own for each place: (first token, end, number)."""
    cut: list[Span] = []
    begin, waiting = 0, list(reversed(places))
    for span in spans:
        while waiting and waiting[-1][0] < span.end:
            start, end, number = waiting.pop()
            if span.role != "prefix" or end > span.end:
                raise DataError("the chat template writes the class into what a message says")
            if start > begin:
                cut.append(span._replace(end=start))
            cut.append(span._replace(end=end, prefix=number))
            begin = end
        if span.end > begin:
            cut.append(span)
            begin = span.end
    return cut


@lru_cache(MAX_CLASSES)
def _prefixes_of(template: Template, tokenizer: Tokenizer, condition: str) -> tuple[Prefix, ...]:
    """The prefixes of a question and its answer under a class, each once, in order. They have the same places under
    every class. Without a class: those of any."""
    condition = condition or CLASS
    said = (Message("user", ASKED), Message("assistant", ANSWERED))
    own, plain = (tokenizer.split_at_specials(template.render(Conversation(said, each))) for each in (condition, ""))
    if own[1::2] != plain[1::2]:
        raise DataError(f"with the class {condition!r} the chat template writes other special tokens than without")
    changed = [i for i in range(0, len(own), 2) if own[i] != plain[i]]
    if 0 in changed:
        raise DataError("the chat template writes the class in front of the first special token")
    found = tuple(dict.fromkeys(_prefix(own[i], plain[i], own[i - 1]) for i in changed))
    if condition != CLASS and [p[1:] for p in found] != [p[1:] for p in _prefixes_of(template, tokenizer, CLASS)]:
        raise DataError(f"the chat template writes the class {condition!r} at other places than others")
    if not 0 < len(found) <= NUM_PREFIXES:
        raise DataError(f"the chat template writes the class in {len(found)} ways; 1 to {NUM_PREFIXES} are possible")
    return found


def _prefix(own: str, plain: str, special: str) -> Prefix:
    """Of two texts behind a special token, one with the class, the part that changes, up to the end of a word."""
    said = next((each for each in (ASKED, ANSWERED) if each in plain), "")
    own, plain = (text.partition(said)[0] if said else text for text in (own, plain))
    same = commonprefix([own[::-1], plain[::-1]])[::-1]
    word = next((i for i, letter in enumerate(same) if not letter.isalnum()), len(same))
    found = Prefix(own[: len(own) - len(same) + word], plain[: len(plain) - len(same) + word], same[word:][:1], special)
    if said and not found.behind:
        raise DataError("between the class and what a message says the chat template writes nothing")
    if not found.plain:
        raise DataError("where there is no class, the chat template writes nothing in its place")
    return found


def _numbers(own: Sequence[str], plain: Sequence[str], prefixes: Sequence[Prefix]) -> dict[int, int]:
    """Place -> number of the prefix, of all texts that change with the class."""
    if len(own) != len(plain):
        raise DataError("with the class the chat template writes other special tokens than without")
    found = {}
    for place, (ours, theirs) in enumerate(zip(own, plain, strict=True)):
        if ours == theirs:
            continue
        for number, prefix in enumerate(prefixes, 1):
            rest = ours[len(prefix.text) :]
            if place and (ours, theirs, rest[:1]) == (prefix.text + rest, prefix.plain + rest, prefix.behind):
                found[place] = number
                break
        else:
            raise DataError("the class changes the text at other places than the prefixes of turns")
    return found


def _texts(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[str]:
    """The texts between special tokens."""
    texts = [""]
    for segment in segments:
        first, *others = tokenizer.split_at_specials(segment.text)[::2] if segment.is_live else [segment.text]
        texts[-1] += first
        texts += others
        texts += [""] * len(segment.ids)
    return texts


def _between(tokenizer: Tokenizer, input_ids: Sequence[int]) -> list[list[int]]:
    """The ids between special tokens."""
    specials, found = set(tokenizer.special_tokens.values()), [[]]
    for each in input_ids:
        if each in specials:
            found.append([])
        else:
            found[-1].append(each)
    return found


def _crossing(condition: str) -> DataError:
    where = f"under the class {condition!r}" if condition else "without a class"
    return DataError(f"{where}, a token holds the end of a turn's prefix and what stands behind it")
