"""Draw the conversations that are mapped: as many of each class, by a seed, with their class and their prompt.

sample = draw(held_out.read_held_out(...), classes=(), per_class=500, seed=0)
sample.written("GPT4", template, tokenizer)      # as one model reads them: each under its own class, and under GPT4
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ochat.data.batch import Example
from ochat.errors import ConfigError, DataError
from ochat.evaluate.held_out import HeldOut
from ochat.evaluate.represent.probe import FOLDS
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

LEAST_PER_CLASS = 2 * FOLDS


@dataclass(frozen=True, eq=False)
class Sample:
    """n conversations; the weight of a token says whether it is the answers' (1) or not (0)."""

    conversations: list[HeldOut]
    classes: tuple[str, ...]
    labels: NDArray[np.int64]  # (n,) the class, as its place in `classes`
    prompts: NDArray[np.int64]  # (n,) equal where system text and first user message are

    def written(self, shared: str, template: Template, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
        """Each under its own class's prefixes, and each under those of the class `shared`: the same tokens otherwise.

        Raises: DataError for a conversation whose prompt leaves no room for its answer.
        """
        pairs = [each.under([each.condition, shared], template, tokenizer) for each in self.conversations]
        for own, _ in pairs:
            if not len(own.input_ids):
                raise DataError(
                    f"a conversation of class {own.condition!r} has a prompt that fills the template's context of "
                    f"{template.context} tokens; leave it out of the data"
                )
        return [own for own, _ in pairs], [other for _, other in pairs]


def draw(conversations: Sequence[HeldOut], classes: Sequence[str], per_class: int, seed: int) -> Sample:
    """`per_class` of each class (none: of all classes there are), or as many as the smallest class has.

    Conversations without an answer to learn from are left out. Raises: ConfigError for a class that is not there;
    DataError for fewer than two classes, one of fewer than LEAST_PER_CLASS conversations, or fewer prompts than FOLDS.
    """
    answered = [each for each in map(_answers_alone, conversations) if any(span.weight for span in each.spans)]
    counts = Counter(each.condition for each in answered)
    names = tuple(dict.fromkeys(classes)) or tuple(sorted(counts))
    _check(counts, names, per_class)
    size = min(per_class, *(counts[name] for name in names))
    random = np.random.default_rng(seed)
    chosen: list[HeldOut] = []
    for name in names:
        places = [place for place, each in enumerate(answered) if each.condition == name]
        chosen += [answered[place] for place in np.sort(random.permutation(places)[:size])]
    keys = [_prompt(each) for each in chosen]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if len(numbers) < FOLDS:
        raise DataError(
            f"the conversations answer {len(numbers)} different prompts, and {FOLDS} are needed: the probe is tried on "
            "prompts that it was not fitted to; give more data"
        )
    labels = np.repeat(np.arange(len(names)), size)
    return Sample(chosen, names, labels, np.array([numbers[key] for key in keys]))


def _answers_alone(conversation: HeldOut) -> HeldOut:
    """With weight 1 on the assistant's messages that are learnt from, ends of turns included, and 0 elsewhere."""
    spans = [
        span._replace(weight=float(span.role == "assistant" and span.is_supervised)) for span in conversation.spans
    ]
    return replace(conversation, spans=spans)


def _check(counts: Counter[str], names: tuple[str, ...], per_class: int) -> None:
    known = ", ".join(f"{name or 'none'} ({count:,})" for name, count in sorted(counts.items()))
    if per_class < LEAST_PER_CLASS:
        raise ConfigError(f"--per-class {per_class}: at least {LEAST_PER_CLASS} are needed")
    for name in names:
        if name not in counts:
            raise ConfigError(f"--classes: the data has no answers of the class {name!r}; it has {known or 'none'}")
    if len(names) < 2:
        raise DataError(f"there is nothing to tell apart: two classes are needed, and there is {known or 'none'}")
    few = [name for name in names if counts[name] < LEAST_PER_CLASS]
    if few:
        raise DataError(
            f"class {few[0]!r} has {counts[few[0]]} conversations with an answer, and {LEAST_PER_CLASS} are needed; "
            f"give more data, or choose other classes with --classes; there are {known}"
        )


def _prompt(conversation: HeldOut) -> tuple[bytes, bytes]:
    """The ids of the system text and of the first user message (of the first message, where no user speaks)."""
    begins = [0, *(span.end for span in conversation.spans)]
    texts = {"system": b"", "user": b"", "assistant": b""}
    for begin, span in zip(begins, conversation.spans, strict=False):
        if span.role in texts and not texts[span.role]:
            texts[span.role] = conversation.input_ids[begin : span.end].tobytes()
    return texts["system"], texts["user"] or texts["assistant"]
