"""Reads the template and classes that an exported folder declares in openchat.json."""

from __future__ import annotations

import logging
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
    """The named template, or the one that openchat.json in the folder describes. Raises: ConfigError."""
    if name is not None:
        return templates.with_bos_of(templates.load(name), tokenizer)
    path, content = folder / OPENCHAT, read_description(folder)
    if not content:
        raise ConfigError(f"{folder}: has no {OPENCHAT} that names its template; give --template NAME")
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
    Warns of a class that the model was not trained on. Raises: ConfigError, also for a tokenizer that cannot write it.
    """
    template = load_template(folder, name, tokenizer)
    template.check(tokenizer)
    if condition is not None:
        template = templates.with_default_condition(template, condition, tokenizer)
    warn_of_unknown_class(template.default_condition, read_description(folder).get("classes"))
    return template


def read_description(folder: Path) -> dict[str, Any]:
    """The content of openchat.json in an exported folder; {} where there is none. Raises: ConfigError."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder. {how_to_fetch(folder)}")
    path = folder / OPENCHAT
    return bounded_json.read_object(path, ConfigError, "export the model again") if path.exists() else {}


def warn_of_unknown_class(condition: str, classes: list[str] | None) -> None:
    """Log a warning if a model was not trained on the class `condition`, where its `classes` are known."""
    if classes and condition and condition not in classes:
        known = ", ".join(repr(name) if name else "none" for name in classes)
        log.warning("the model was not trained on the class %r; it knows %s", condition, known)
