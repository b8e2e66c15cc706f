"""A command line as its parser reads it without loss: each value of a repeatable option behind a flag of its own.

spread(PrepareOptions, ["--input", "a", "b", "--input", "c"])  # --input=a --input=b --input=c
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field

from ochat.errors import UsageError


@dataclass
class _Group:
    """An option and what stands between it and the next one; `kind` tells how much of that is its own."""

    flag: str = ""  # "" before the first option
    kind: type = bool  # tuple: takes any number of values, bool: none, object: one
    attached: str | None = None  # the value behind "="
    words: list[str] = field(default_factory=list)

    @property
    def num_own(self) -> int:
        """Words that are the option's values."""
        if self.attached is not None or self.kind is bool:
            return 0
        return len(self.words) if self.kind is tuple else min(len(self.words), 1)

    def spread(self, num_own: int) -> list[str]:
        """The group as arguments, its first `num_own` words as values."""
        if self.attached is not None:
            return [f"{self.flag}={self.attached}", *self.words]
        if self.kind is not tuple or not num_own:
            return [self.flag, *self.words] if self.flag else self.words
        return [*(f"{self.flag}={word}" for word in self.words[:num_own]), *self.words[num_own:]]


def spread(options: type, arguments: Sequence[str], num_positional: int = 0) -> list[str]:
    """`arguments` for the dataclass `options`: `--flag a b`, `--flag a --flag b` and mixes become `--flag=a --flag=b`.

    Where positional arguments (of `num_positional`) are lacking, a repeatable option's last values are they, so that
    `--prompt Hi MODEL` works. Raises: UsageError where an option that takes one value is given twice.
    """
    groups = _groups(arguments, _kinds(options))
    _refuse_repeated(groups)
    num_lacking = num_positional - sum(len(group.words) - group.num_own for group in groups)
    result: list[str] = []
    for group in reversed(groups):
        num_given = max(min(num_lacking, group.num_own - 1), 0) if group.kind is tuple else 0
        num_lacking -= num_given
        result = group.spread(group.num_own - num_given) + result
    return result


def _groups(arguments: Sequence[str], kinds: dict[str, type]) -> list[_Group]:
    groups = [_Group()]
    for argument in arguments:
        if argument.startswith("-") and argument.lstrip("-")[:1].isalpha():  # tyro's rule: -5 and - are values
            flag, is_attached, value = argument.partition("=")
            flag = "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag
            groups.append(_Group(flag, kinds.get(flag, object), value if is_attached else None))
        else:
            groups[-1].words.append(argument)
    return groups


def _kinds(options: type) -> dict[str, type]:
    hints = typing.get_type_hints(options)
    kinds: dict[str, type] = {}
    for option in dataclasses.fields(options):
        name, origin = option.name.replace("_", "-"), typing.get_origin(hints[option.name]) or hints[option.name]
        kinds[f"--{name}"] = origin if origin in (tuple, bool) else object
        if origin is bool:
            kinds[f"--no-{name}"] = bool
    return kinds


def _refuse_repeated(groups: Sequence[_Group]) -> None:
    flags = [group.flag for group in groups if group.kind is not tuple and group.flag not in ("-h", "--help")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise UsageError(f"{flag} is given {flags.count(flag)} times, but takes one value; give it once")
