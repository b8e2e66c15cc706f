"""Reads the template and classes that an exported folder declares in openchat.json."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, how_to_fetch
from ochat.files import bounded_json
from ochat.text import template as templates
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
OPENCHAT = "openchat.json"


def load_template(folder: Path, name: str | None, tokenizer: Tokenizer) -> Template:
    """The named template ("base": the folder's own chat template), or the one that openchat.json in the folder
    describes. Raises: ConfigError."""
    if name == "base":
        return templates.of_base(folder, tokenizer, "", None)
    if name is not None:
        return templates.with_bos_of(templates.load(name), tokenizer)
    path, content = folder / OPENCHAT, read_description(folder)
    if not content:
        raise ConfigError(
            f"{folder}: has no {OPENCHAT} that names its template; give --template NAME, or --template base for the "
            "chat template that the model brings along"
        )
    model_type, described = content.get("model_type"), content.get("template")
    if not isinstance(model_type, str) or not isinstance(described, dict | None):
        raise ConfigError(f"{path}: model_type must name a template, and template describe it; give --template NAME")
    if described is not None:
        return Template.from_dict({"name": model_type} | described, f"{path}: template")
    try:
        return templates.load(model_type)
    except ConfigError as error:
        raise ConfigError(f"{path}: model_type: {error}; or give --template NAME") from None


def template_as(folder: Path, name: str | None, condition: str | None, tokenizer: Tokenizer) -> Template:
    """load_template's, with the class `condition` where a conversation has none (None: the template's own; "": none).
    Warns of a default that the model was not trained with. Raises: ConfigError, also as with_class."""
    template, classes = load_template(folder, name, tokenizer), known_classes(folder)
    template.check(tokenizer)
    if condition is not None:
        return with_class(template, condition, classes, tokenizer, "--condition: ")
    warn_of_unknown_class(template.default_condition, classes)
    return template


def with_class(
    template: Template, condition: str, classes: Sequence[str], tokenizer: Tokenizer, option: str
) -> Template:
    """The template with the class `condition` where a conversation has none. `classes`: those that the model was
    trained with; where they are not known ([]: other people's models), any name passes, and no class ("") always does.

    Raises: ConfigError, which starts with `option`, for another class, and for one that no prefix can carry.
    """
    template = templates.with_default_condition(template, condition, tokenizer, option)
    if condition and classes and condition not in classes:
        folded = {name.casefold(): name for name in classes if name}
        near = difflib.get_close_matches(condition.casefold(), folded, n=1)
        hint = f"did you mean {folded[near[0]]!r}? " if near else ""
        raise ConfigError(f"{option}the model has no class {condition!r}; {hint}known: {_named(classes)}")
    return template


def against(template: Template, name: str | None, classes: Sequence[str], tokenizer: Tokenizer) -> str:
    """The class that guidance leads away from: `name` ("none": no class, ""), or the only other one of `classes`.

    Raises: ConfigError where there is no or more than one other, for the class that answers, and as with_class.
    """
    own = template.default_condition
    if name is None:
        others = [each for each in classes if each != own]
        if len(others) != 1:
            known = f"the model knows {_named(classes)}" if classes else "the model does not say which classes it knows"
            raise ConfigError(f"--guidance needs --against CLASS, or --against none for no class; {known}")
        return others[0]
    other = "" if name == "none" and name not in classes else name
    if other == own:
        raise ConfigError(f"--against {name}: answers are asked of it; name another class, or none")
    return with_class(template, other, classes, tokenizer, "--against: ").default_condition


def read_description(folder: Path) -> dict[str, Any]:
    """The content of openchat.json in an exported folder; {} where there is none. Raises: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. {how_to_fetch(folder)}")
    path = folder / OPENCHAT
    return bounded_json.read_object(path, ConfigError, "export the model again") if path.exists() else {}


def known_classes(folder: Path) -> list[str]:
    """The classes that the model in an exported folder was trained with; [] where it does not say."""
    classes = read_description(folder).get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ConfigError(f"{folder / OPENCHAT}: classes must be an array of names; export the model again")
    return classes


def warn_of_unknown_class(condition: str, classes: Sequence[str]) -> None:
    """Log a warning of a class that with_class refuses, where it is not the user's choice, or is to be measured."""
    if classes and condition and condition not in classes:
        log.warning("the model was not trained on the class %r; it knows %s", condition, _named(classes))


def _named(classes: Sequence[str]) -> str:
    return ", ".join(repr(name) if name else "none" for name in classes)
