"""The prefixes of turns that carry a condition, as ids under every class and under none, for a loader to exchange.

    described = describe(template, tokenizer, ("GPT4", "GPT3"))     # what prepare writes into the manifest
    table = PrefixTable.of(described, class_names)
    table.ids, table.starts, table.counts                           # of prefix number n under class c: [n, c]

A template of plain text tokenises a prefix alone. So the ids under another class are those that a conversation of that
class would have, and no token of a message changes. In what a chat template renders, prefixes are only exchanged where
that is so, too: rendered_prefixes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.errors import DataError
from ochat.text import rendered_prefixes
from ochat.text.chat.plain import NUM_PREFIXES
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

OWN, NONE = -2, -1  # in place of a class: the conversation's own conditions; none at all


@dataclass(frozen=True, eq=False)
class PrefixTable:
    """Row n is prefix number n, from 1; a column is a class, the last one (NONE) none."""

    ids: NDArray[np.int64]  # all prefixes, one after another
    starts: NDArray[np.int64]  # (NUM_PREFIXES + 1, C + 1) where in `ids`
    counts: NDArray[np.int64]  # (NUM_PREFIXES + 1, C + 1) ids; -1 for a class that the data set does not have

    @classmethod
    def of(cls, described: Mapping[str, Any], class_names: Sequence[str]) -> PrefixTable:
        """The table of a manifest's `prefixes`, with a column for each of `class_names`."""
        names, nothing = [*class_names, ""], [[]] * NUM_PREFIXES
        columns = [[[], *described["ids"].get(name, nothing)] for name in names]
        prefixes = [column[n] for n in range(NUM_PREFIXES + 1) for column in columns]
        counts = np.array([len(ids) for ids in prefixes], np.int64).reshape(NUM_PREFIXES + 1, len(names))
        starts = (np.cumsum(counts) - counts.ravel()).reshape(counts.shape)
        counts[:, [name not in described["ids"] for name in names]] = -1
        return cls(np.array([i for ids in prefixes for i in ids], np.int64), starts, counts)


def describe(template: Template, tokenizer: Tokenizer, classes: Iterable[str]) -> dict[str, Any]:
    """What a manifest says of prefixes: `ids`, by class in the order of Span.prefix; or `refused`, why none
    can be exchanged."""
    if template.condition_roles == "none":
        return {"refused": f"the template {template.name} or --conditions ignore writes no class"}
    names = list(dict.fromkeys(["", *classes]))
    if template.tokenize == "rendered":
        return _describe_rendered(template, tokenizer, names)
    texts = {name: template.prefix_texts(name) for name in names}
    return {"ids": {name: [list(tokenizer.prefix_ids(text)) for text in texts[name]] for name in names}}


def _describe_rendered(template: Template, tokenizer: Tokenizer, names: Sequence[str]) -> dict[str, Any]:
    ids: dict[str, list[list[int]]] = {}
    try:
        for name in names:
            rendered_prefixes.check(template, tokenizer, name)
            found = rendered_prefixes.ids(template, tokenizer, name)
            ids[name] = found + [[]] * (NUM_PREFIXES - len(found))
    except DataError as error:
        return {"refused": f"the template {template.name}: {error}"}
    return {"ids": ids}
