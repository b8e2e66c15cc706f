"""The models that are compared: their folders, and the template that writes conversations for each.

    compared, tokenizer = find_models([Path("runs/sft"), Path("runs/crlft")], ["SFT", "C-RLFT"], None, data)

They may differ in whether prefixes name the class (models trained without classes name none), and in nothing else that
changes how conversations are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ochat.errors import ConfigError
from ochat.evaluate import held_out
from ochat.export.open_model import folder_of
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import load_template, read_description
from ochat.text.template import Template, check_condition
from ochat.text.tokenizer import Tokenizer


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
    chosen = [_template(folder, template, of_data) for folder in folders]
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


def _template(folder: Path, named: str | None, of_data: Template | None) -> Template:
    if named is None and of_data is not None and not read_description(folder):
        return of_data
    return load_template(folder, None if read_description(folder) else named)


def _turns(template: Template) -> Template:
    """How turns are written, but for the class."""
    return replace(template, name="", context=0, default_condition="", condition_roles="both")
