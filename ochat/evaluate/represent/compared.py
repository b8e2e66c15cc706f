"""What is compared: the models, with the template that writes conversations for each, and a sample of conversations.

    models, tokenizer = find_models([Path("runs/sft"), Path("runs/crlft")], ["SFT", "C-RLFT"], None, data)
    sample = draw(held_out.read_held_out(...), classes=(), per_class=500, seed=0)
    sample.written("GPT4", template, tokenizer)      # as one model reads them: each under its own class, and under GPT4

Models may differ in whether prefixes name the class (models trained without classes name none), and in nothing else
that changes how conversations are written. The sample has as many conversations of each class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ochat.data.batch import Example
from ochat.errors import ConfigError, DataError
from ochat.evaluate import held_out
from ochat.evaluate.held_out import HeldOut
from ochat.evaluate.represent.probe import FOLDS
from ochat.export.open_model import folder_of
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import load_template, read_description
from ochat.text.template import Template, check_condition
from ochat.text.tokenizer import Tokenizer

LEAST_PER_CLASS = 2 * FOLDS


@dataclass(frozen=True)
class ComparedModel:
    """A model and its template."""

    label: str
    source: Path  # as it was given
    template: Template

    @property
    def names_classes(self) -> bool:
        """Whether its prefixes name classes."""
        return self.template.condition_roles != "none"


def find_models(
    sources: Sequence[Path], labels: Sequence[str], template: str | None, data: Path
) -> tuple[list[ComparedModel], Tokenizer]:
    """The models, and the tokenizer that they share. `template`: of models without openchat.json; None: that of
    prepared data. Raises: ConfigError for models, or data, that cannot be compared.
    """
    folders = [folder_of(source) for source in sources]
    tokenizer = tokenizers.load(folders[0])
    for source, folder in zip(sources[1:], folders[1:], strict=True):
        if tokenizers.load(folder).fingerprint() != tokenizer.fingerprint():
            raise ConfigError(f"{source}: has another tokenizer than {sources[0]}: they cannot be compared")
    if template is not None and all(read_description(folder) for folder in folders):
        raise ConfigError(f"--template {template}: every model here has an openchat.json with its own; leave it out")
    of_data = held_out.template_of(data, None, tokenizer) if held_out.is_prepared(data) else None
    chosen = [_template(folder, template, of_data, tokenizer) for folder in folders]
    context = min(each.context for each in chosen)
    for source, each in zip(sources, chosen, strict=True):
        each.check(tokenizer)
        if _turns(each) != _turns(of_data or chosen[0]):
            other = f"the data {data}" if of_data else sources[0]
            raise ConfigError(f"{source}: speaks another template ({each.name}) than {other}: they cannot be compared")
    names = zip(labels, sources, chosen, strict=True)
    return [ComparedModel(label, source, replace(each, context=context)) for label, source, each in names], tokenizer


def one_prefix(
    name: str | None, compared: Sequence[ComparedModel], classes: Sequence[str], tokenizer: Tokenizer
) -> str:
    """The class whose prefixes all conversations get as a control: `name`, or the one that the models answer as, or the
    first of the data. Raises: ConfigError for a class that no prefix can carry."""
    defaults = [each.template.default_condition for each in compared if each.names_classes]
    if name is None:
        return next((each for each in defaults if each), classes[0])
    check_condition(name, tokenizer, "--one-prefix: ")
    return name


def _template(folder: Path, named: str | None, of_data: Template | None, tokenizer: Tokenizer) -> Template:
    if named is None and of_data is not None and not read_description(folder):
        return of_data
    return load_template(folder, None if read_description(folder) else named, tokenizer)


def _turns(template: Template) -> Template:
    """How turns are written, but for the class."""
    return replace(template, name="", context=0, default_condition="", condition_roles="both")


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
    _check(counts, names)
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


def _check(counts: Counter[str], names: tuple[str, ...]) -> None:
    known = ", ".join(f"{name or 'none'} ({count:,})" for name, count in sorted(counts.items()))
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
