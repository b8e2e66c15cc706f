"""Read held-out conversations, tokenise them once, and write them under the prefixes of any class.

    held_out = read_held_out(Path("data/train-held-out"), template, tokenizer)      # or files of conversations
    held_out[0].under(["GPT4", "GPT3"], template, tokenizer)                        # an Example under each

Where a template tokenises every segment alone, exchanging the prefixes' ids gives the same as encoding the conversation
again. Where it renders the whole text, the conversation is encoded again. A prepared set has none: there the class is
exchanged in the text of its headers, and a probe shows whether that is right for the template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.data.batch import Example
from ochat.data.dataset import Paths, TokenDataset, folder_list, shown_paths
from ochat.data.encode import num_supervised
from ochat.data.manifest import MANIFEST
from ochat.data.readers import parse_records
from ochat.errors import ConfigError, DataError
from ochat.text import record_formats
from ochat.text.conversation import Conversation, Message
from ochat.text.openchat_json import load_template, read_description
from ochat.text.template import Span, Template, check_condition
from ochat.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A conversation's ids, and the spans that cover them in order."""

    input_ids: NDArray[np.int64]  # (len,)
    spans: list[Span]
    condition: str  # its class
    conversation: Conversation | None = None  # that it was encoded from; None: of a prepared set
    place: str = ""  # file:line of its record

    @classmethod
    def of(cls, conversation: Conversation, template: Template, tokenizer: Tokenizer) -> HeldOut:
        """The whole conversation, neither cut nor trimmed."""
        ids, spans = template.encode_spans(conversation, tokenizer)
        return cls(np.array(ids, np.int64), spans, conversation.condition, conversation)

    def under(self, conditions: Sequence[str], template: Template, tokenizer: Tokenizer) -> list[Example]:
        """The conversation under each condition's prefixes, up to its last supervised token.

        All hold the same supervised tokens: what the longest prefix pushes out of the template's context is left out
        under every other too. Without any that fit, each is empty.
        Raises: ConfigError where that needs the conversation itself; DataError where the class changes its tokens.
        """
        written = [self._written(condition, template, tokenizer) for condition in conditions]
        most = min(int(is_own[: template.context].sum()) for _, _, is_own in written)
        examples = []
        for condition, (ids, weights, is_own) in zip(conditions, written, strict=True):
            supervised = np.flatnonzero((weights != 0) & (is_own.cumsum() <= most))
            end = int(supervised[-1]) + 1 if len(supervised) else 0
            examples.append(Example(ids[:end], weights[:end], condition))
        return examples

    def _written(
        self, condition: str, template: Template, tokenizer: Tokenizer
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """Ids, weights and whether a token is the conversation's own, not a turn's prefix; (len,) each."""
        if template.tokenize == "rendered":
            return self._rendered(condition, template, tokenizer)
        pieces, suffix = [], ""  # what stands behind the turn before
        begins = [0, *(span.end for span in self.spans)]
        following = [after.role for _, after in pairwise(self.spans)] + [""]
        for begin, span, role in zip(begins, self.spans, following, strict=False):
            if is_own := not (span.role == "prefix" and role in ("user", "assistant")):
                ids = self.input_ids[begin : span.end]
            else:
                ids = np.array(tokenizer.prefix_ids(suffix + template.role_prefix(role, condition)), np.int64)
            suffix = suffix if span.role in ("bos", "prefix") else template.suffix
            pieces.append((ids, np.full(len(ids), span.own_weight, np.float32), np.full(len(ids), is_own)))
        ids, weights, is_own = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return ids, weights, is_own

    def _rendered(
        self, condition: str, template: Template, tokenizer: Tokenizer
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """`_written` for a template that renders the whole text; the spans' weights are kept, token by token."""
        weights, is_own = _by_token(self.spans)
        if condition == self.condition or template.condition_roles == "none":
            return self.input_ids, weights, is_own
        if self.conversation is None:
            if _can_exchange(self.condition, condition, template, tokenizer):
                return self._exchanged(condition, tokenizer)
            raise ConfigError(
                f"the class {self.condition!r} of conversations that are prepared with the template {template.name} "
                f"cannot become {condition!r}; give the conversations themselves (the files that were prepared)"
            )
        ids, spans = template.encode_spans(replace(self.conversation, condition=condition), tokenizer)
        written, is_written = _by_token(spans)
        if is_written.sum() != is_own.sum():
            raise DataError(
                f"the template {template.name} writes messages otherwise under the class {condition!r}, so that their "
                "tokens cannot be compared"
            )
        written[is_written] = weights[is_own]
        return np.array(ids, np.int64), written, is_written

    def _exchanged(
        self, condition: str, tokenizer: Tokenizer
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
        """`_written` by exchanging the class where a header begins with it: behind a special token."""
        weights, is_own = _by_token(self.spans)
        specials = set(tokenizer.special_tokens.values())
        before, after = f"{self.condition} ", f"{condition} " if condition else ""
        pieces, first = [], 0
        for is_special, stretch in groupby(self.input_ids.tolist(), specials.__contains__):
            ids = list(stretch)
            last = first + len(ids)
            own = np.flatnonzero(is_own[first:last])
            header = ids[: int(own[0]) if len(own) else len(ids)]
            rest = slice(first + len(header), last)
            if not is_special and tokenizer.decode(header).startswith(before):
                changed = tokenizer.encode(after + tokenizer.decode(ids).removeprefix(before))
                header = changed[: len(changed) - len(ids) + len(header)]
                if changed[len(header) :] != self.input_ids[rest].tolist():
                    raise DataError(
                        f"the class {condition!r} changes the tokens of a message, so they cannot be compared"
                    )
            nothing = np.zeros(len(header))
            pieces += [(header, nothing, nothing > 0), (self.input_ids[rest], weights[rest], is_own[rest])]
            first = last
        ids, weights, is_own = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return ids.astype(np.int64), weights.astype(np.float32), is_own.astype(np.bool_)


@lru_cache(maxsize=256)
def _can_exchange(own: str, other: str, template: Template, tokenizer: Tokenizer) -> bool:
    """Whether the class in the headers of a prepared conversation can be exchanged: it gives a probe's ids."""
    if not own:
        return False
    probe = Conversation((Message("user", "Why?"), Message("assistant", "So.")) * 2, own, "S")
    ids, spans = template.encode_spans(probe, tokenizer)
    found = HeldOut(np.array(ids, np.int64), spans, own)._exchanged(other, tokenizer)[0]
    return found.tolist() == template.encode(replace(probe, condition=other), tokenizer)[0]


def _by_token(spans: Sequence[Span]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Of each token its weight, and whether it is a message's or the system text's."""
    counts = np.diff([0, *(span.end for span in spans)])
    weights = np.repeat(np.array([span.own_weight for span in spans], np.float32), counts)
    return weights, np.repeat([span.role != "prefix" for span in spans], counts)


def is_prepared(data: Paths) -> bool:
    """Whether this is what `ochat prepare` wrote, one folder or the shards of one input."""
    return all((folder / MANIFEST).is_file() for folder in folder_list(data))


def template_of(data: Paths, of_model: Template | None, tokenizer: Tokenizer) -> Template:
    """The template of a prepared data set. Raises: ConfigError where the model speaks another, or has another
    tokenizer."""
    dataset = TokenDataset(data)
    path = dataset.path
    if dataset.manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint():
        raise ConfigError(
            f"{path}: prepared with another tokenizer than the model's; prepare it with the model's base, or give the "
            "conversations themselves"
        )
    if of_model is not None and _turns(of_model) != _turns(dataset.template):
        raise ConfigError(
            f"{path}: prepared with another template or --conditions than the model speaks ({of_model.name}); prepare "
            "it alike, or give the conversations themselves"
        )
    return dataset.template


def choose_template(data: Paths, folder: Path, name: str | None, tokenizer: Tokenizer) -> Template:
    """The template of a prepared data set, which must be the model's too; of other data the model's, or the one called
    `name`. `folder`: the model's. Raises: ConfigError."""
    if not is_prepared(data):
        template = load_template(folder, name, tokenizer)
    elif name is not None:
        raise ConfigError(f"--template {name}: {shown_paths(data)} is prepared, and has its own; leave it out")
    else:
        of_model = load_template(folder, None, tokenizer) if read_description(folder) else None
        template = template_of(data, of_model, tokenizer)
    template.check(tokenizer)
    return template


def choose_conditions(
    asked: Sequence[str], conversations: Sequence[HeldOut], template: Template, tokenizer: Tokenizer
) -> tuple[str, ...]:
    """The classes that were asked for, or the data's; ("",) for a template whose prefixes name no class.

    Raises: ConfigError for a class that no prefix can carry.
    """
    if template.condition_roles == "none":
        if any(asked):
            raise ConfigError(f"--conditions: the template {template.name} has none in its prefixes; leave it out")
        return ("",)
    conditions = tuple(dict.fromkeys(asked or sorted({each.condition for each in conversations})))
    for condition in conditions:
        check_condition(condition, tokenizer)
    return conditions


def read_held_out(data: Paths, template: Template, tokenizer: Tokenizer) -> list[HeldOut]:
    """The conversations with something supervised, as open_conversations reads them.

    Raises: DataError naming file and line of a record that is none, and where nothing is supervised.
    """
    each = open_conversations(data, template, tokenizer)
    found = [held_out for held_out in each if num_supervised(held_out.spans)]
    if not found:
        raise DataError(
            f"{shown_paths(data)}: no conversation there has anything supervised: there is nothing to measure"
        )
    return found


def open_conversations(data: Paths, template: Template, tokenizer: Tokenizer) -> Prepared | list[HeldOut]:
    """The conversations of a prepared data set, or of files as `ochat prepare` reads, which are all held in memory.

    Raises: DataError naming file and line of a record that is none.
    """

    def parse(value: dict[str, Any]) -> HeldOut:
        return HeldOut.of(record_formats.convert(value, attributes=template.attributes), template, tokenizer)

    if is_prepared(data):
        return Prepared(TokenDataset(data))
    records = (found for path in folder_list(data) for found in parse_records(path, parse))
    return [replace(held_out, place=record.location) for record, held_out in records]


class Prepared:
    """The conversations of a prepared data set, each read when it is asked for."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[HeldOut]:
        for index, one in enumerate(self.dataset):
            place = self.dataset.source_location(index)
            yield HeldOut(one.input_ids, self.dataset.spans(index), one.condition, place=place)


def select(conversations: Sequence[HeldOut], only_class: str | None, limit: int | None) -> list[HeldOut]:
    """Those of one class (None: all), the first `limit` of each class (None: all), in order. Raises: ConfigError."""
    classes = list(dict.fromkeys(each.condition for each in conversations))
    if only_class is not None and only_class not in classes:
        known = ", ".join(name or "none" for name in classes)
        raise ConfigError(f"--only-class {only_class}: the data has no such class; it has {known}")
    taken, seen = [], Counter[str]()
    for each in conversations:
        seen[each.condition] += 1
        if only_class in (None, each.condition) and (limit is None or seen[each.condition] <= limit):
            taken.append(each)
    return taken


def _turns(template: Template) -> Template:
    """What of a template decides how turns are written."""
    return replace(template, name="", context=0, default_condition="")
