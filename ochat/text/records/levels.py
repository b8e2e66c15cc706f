"""The kinds of objects that have keys, and what a key means that is not in the table of keys.py.

    level = Level("part", Key("text", "text value", "the text"))
    level.meaning("value", "Hi")       # "text"

A key that is in the table is read, or refused by its name. All others are metadata: counted and left out, unless one
looks like a key of the table.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import Any

from ochat.errors import DataError
from ochat.text.fields import LONGEST_NAME, shorten

MISSPELT = 0.8  # difflib's ratio: `itemz`, `wieght` and `conditions` reach it, `id`, `edition` and `title` do not
IGNORE = "--ignore"
# meanings without which an object below the record says nothing: a bare name in --ignore does not reach them
_NEEDED = ("role", "content", "type", "text", "start", "last", "function", "name", "arguments")
# What a key that is not in the table is about, by its last word but for words of _SAID: `Complex_CoT`, `tool_list`
_ABOUT = {
    "reasoning": ("think", "thinking", "thought", "thoughts", "reasoning", "cot"),
    "history": ("history",),
    "system": ("system", "developer"),
    "tools": ("tool", "tools", "function", "functions"),
}
_SAID = {"text", "content", "message", "messages", "msg", "prompt", "prompts", "instruction", "instructions", "list"}
_SAID |= {"json", "definitions", "schemas", "specs", "trace", "traces", "trajectory", "details", "steps", "process"}
_WEIGHING = {"weight", "weights", "mask", "masks", "loss", "train", "training", "trainable", "trained", "untrained"}
_WEIGHING |= {"masked", "ignore", "ignored", "exclude", "excluded", "learn", "learnable", "supervised"}


class Key:
    """Keys of one meaning, written with blanks between them; a `meaning` of "" refuses them, and `text` says why."""

    def __init__(self, meaning: str, names: str, text: str) -> None:
        self.meaning, self.names, self.text = meaning, tuple(names.split()), text


class Level:
    """The keys of one kind of object: a record, a message, a content part, a tool call.

    `meanings`: key -> what it means, of those that are read.
    """

    def __init__(self, name: str, *keys: Key) -> None:
        self.name, self.keys = name, keys
        self.meanings = {name: key.meaning for key in keys if key.meaning for name in key.names}
        self.by_name = {name: key for key in keys for name in key.names}
        self._by_meaning = {key.meaning: key.names for key in keys}

    def names(self, meaning: str) -> tuple[str, ...]:
        """The keys that have this meaning."""
        return self._by_meaning[meaning]

    def shown(self, name: str) -> str:
        """The key as reports and --ignore name it: `weight` of a record, `message.weight` of a message."""
        return shorten(name) if self.name == "record" else f"{self.name}.{shorten(name)}"

    def ignores(self, name: str, ignored: frozenset[str]) -> bool:
        """Whether the key is to be left out: it is named as `shown`, or by its bare name, which is for every level."""
        return self.shown(name) in ignored or (name in ignored and self.meanings.get(name) not in _NEEDED)

    def meaning(self, name: str, value: Any) -> str:
        """What the key means, "" for metadata and for an empty value of a key that is refused.

        Raises: DataError for a key that is refused, or that is not in the table but looks as if it belonged there.
        """
        key = self.by_name.get(name)
        if key is None:
            wrong = self._resembles(name, value)
        elif key.meaning or not has_content(value):
            return key.meaning
        else:
            wrong = key.text
        if wrong:
            raise self.refusal(name, wrong)
        return ""

    def refusal(self, name: str, why: str) -> DataError:
        """What to raise for a key that cannot be read, but be ignored."""
        return DataError(f"{shorten(name)}: {why}; or leave it out with {IGNORE} {self.shown(name)}")

    def _resembles(self, name: str, value: Any) -> str:
        """What is wrong with a key that is not in the table, "" for metadata."""
        if len(name) > LONGEST_NAME:
            return ""
        close, about = _compare(name, self)
        if close:
            mapped = ", or name it in --map" if self.name == "record" else ""
            return f"unknown key; did you mean {close!r}? Then rename it{mapped}"
        if about == "weight" and _is_weight(value):
            return "it looks like a weight, but is not read; name it weight or loss_mask"
        if about and about != "weight" and _is_said(value):
            return f"it looks like {about}, but is not read; name it {self.names(about)[0]}"
        return ""


@lru_cache(maxsize=4096)  # the same keys come with every record, and difflib is slower than a tokenizer
def _compare(name: str, level: Level) -> tuple[str, str]:
    """The key of the level that `name` is close to, and the meaning that its words speak of; "" if there is none.

    `prompt_id` is about the prompt, not misspelt.
    """
    about = _about(name)
    about = about if about == "weight" or about in level.meanings.values() else ""
    if any(name.startswith(f"{key}_") or name.endswith(f"_{key}") for key in level.meanings):
        return "", about
    return next(iter(difflib.get_close_matches(name.lower(), level.meanings, n=1, cutoff=MISSPELT)), ""), about


def _about(name: str) -> str:
    """The meaning that the words of a key speak of, "" if there is none."""
    words = re.findall("[a-z0-9]+", re.sub("(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower())
    if not _WEIGHING.isdisjoint(words):
        return "weight"
    about = [word for word in words if word not in _SAID][-1:]
    is_said = about != words[-1:]
    for meaning, nouns in _ABOUT.items():
        if about and about[0] in nouns and (is_said or meaning in ("reasoning", "history")):
            return meaning
    return ""


def _is_weight(value: Any) -> bool:
    """Whether a value may say how much is trained, or what: numbers, also as text, or a list of roles."""
    if isinstance(value, str):
        return bool(re.fullmatch(r"\s*(true|false|-?[0-9.]+|\[.*)\s*", value[:LONGEST_NAME], re.IGNORECASE))
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, int | float | str)


def _is_said(value: Any) -> bool:
    """Whether a value may be said in a prompt or an answer."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str | dict | list) and has_content(first)


def has_content(value: Any) -> bool:
    """False for null, blank text, an empty list, and an object in which nothing has content."""
    if isinstance(value, dict):  # Parquet cannot tell one whose values are null from an empty one
        return any(map(has_content, value.values()))
    return bool(value.strip() if isinstance(value, str) else value) or isinstance(value, int | float)
