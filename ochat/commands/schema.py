"""`ochat schema`: the JSON schema of a config. Editors complete and explain keys where a file begins with its address:

#:schema ../docs/ochat.schema.json
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from typing import Any

import msgspec

from ochat import config
from ochat.config import Config, Section


@dataclass(frozen=True)
class SchemaOptions:
    """Prints the JSON schema of a config, docs/ochat.schema.json.

    An editor with TOML support uses it where a config begins with `#:schema PATH`.
    """


def main(_: SchemaOptions) -> None:
    """Prints it."""
    print(text(), end="")


def text() -> str:
    """The schema as JSON."""
    named = msgspec.json.schema(Config)["$defs"]
    for kind in sections(Config):
        described, explained = named[kind.__name__], config.explanations(kind)
        described["description"] = " ".join((inspect.getdoc(kind) or "").split())
        for key, value in described["properties"].items():
            if isinstance(value.get("default"), dict):  # its keys have theirs
                del value["default"]
            if key in explained:  # a section explains itself
                described["properties"][key] = {"description": explained[key], **value}
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **named.pop("Config"), "$defs": named}
    return json.dumps(whole, indent=1) + "\n"


def sections(kind: Any) -> list[type[Section]]:
    """A section and those in it."""
    found = [kind]
    for field in msgspec.structs.fields(kind):
        inner = [each for each in (field.type, *getattr(field.type, "__args__", ())) if isinstance(each, type)]
        found += [s for each in inner if issubclass(each, Section) for s in sections(each)]
    return found
