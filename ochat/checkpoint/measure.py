"""Name one number of an evaluation, a line of eval.jsonl, and say which of two is better.

    measure = Measure.parse('hard.loss."GPT-3.5"', "--best-by");  measures(line)[measure];  str(measure)

SET.loss  SET.accuracy  SET.exact  SET.loss.CLASS ...      without a class: all together

SET is held_out, the set of data.eval_path, or a name of [eval]. Names with dots are quoted as in TOML, so that a set or
a class may have any name, "all" too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ochat.config import HELD_OUT
from ochat.errors import ConfigError
from ochat.files.jsonl import finite_number
from ochat.overrides import dotted_path

LOSS, ACCURACY, EXACT = "loss", "accuracy", "exact"
KINDS = (LOSS, ACCURACY, EXACT)
ALL = "all"  # classes together, in words
SETS = "sets"  # the key of a line that has the sets of [eval]


class Measure(NamedTuple):
    """A number of an evaluation: nats a token, or a share."""

    of: str  # HELD_OUT, or a name of [eval]
    kind: str  # of KINDS
    name: str | None = None  # a class; of an exact-match task the class that answers; None: all together

    @classmethod
    def parse(cls, text: str, key: str) -> Measure:
        """Raises: ConfigError, which begins with `key`, for a text that names none."""
        path = dotted_path(text)
        if len(path) not in (2, 3) or path[1] not in KINDS:
            raise ConfigError(
                f"{key} = {text!r}: expected SET.loss, SET.accuracy or SET.exact, and .CLASS for one class, such as "
                f'{HELD_OUT}.loss.GPT4; a name with dots is quoted, as in {HELD_OUT}.loss."GPT-3.5"'
            )
        return cls(*path)

    def __str__(self) -> str:
        return ".".join(_quoted(part) for part in self if part is not None)

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.kind == LOSS else -1

    @property
    def in_words(self) -> str:
        """What it is, for example "held-out loss of GPT4", or "exact match in exam under GPT4"."""
        if self.kind == EXACT:
            return f"exact match in {self.of}" + ("" if self.name is None else f" under {class_label(self.name)}")
        before, after = ("held-out ", "") if self.of == HELD_OUT else ("", f" in {self.of}")
        whose = "all classes, weighted" if self.name is None else class_label(self.name)
        return f"{before}{self.kind} of {whose}{after}"

    @property
    def best_in_words(self) -> str:
        """What the best one has, for example "the lowest held-out loss of GPT4"."""
        return f"the {'lowest' if self.sign > 0 else 'highest'} {self.in_words}"

    def shown(self, value: float | None) -> str:
        """A value as tables show it."""
        return "-" if value is None else f"{value:.4f}" if self.kind == LOSS else f"{value:.1%}"


def measures(line: dict[str, Any]) -> dict[Measure, float | None]:
    """Every number of a line of eval.jsonl, also of earlier versions; None for one that is not finite."""
    sets = {HELD_OUT: {key: value for key, value in line.items() if key != SETS}} | _objects(line.get(SETS))
    return {found: finite_number(value) for of, row in sets.items() for found, value in _of_set(of, row)}


def class_label(name: str) -> str:
    """A class in words: records without one have the empty name, and ALL stands for all together."""
    return {"": "(no class)", ALL: f"{ALL} (the class)"}.get(name, name)


def _of_set(of: str, row: dict[str, Any]) -> Iterator[tuple[Measure, Any]]:
    yield from ((Measure(of, kind), row[kind]) for kind in KINDS if kind in row)
    for name, own in _objects(row.get("classes")).items():
        yield from ((Measure(of, kind, name), own[kind]) for kind in KINDS if kind in own)


def _objects(value: Any) -> dict[str, dict[str, Any]]:
    return {name: row for name, row in value.items() if isinstance(row, dict)} if isinstance(value, dict) else {}


def _quoted(part: str) -> str:
    quoted = json.dumps(part, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped
    return part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else quoted
