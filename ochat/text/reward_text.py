"""A continuous reward as the text of a condition, by bins or rounded.

    RewardText(edges=(0.2, 0.5)).of(0.5)        # "reward:2": below 0.2 is 0, from 0.2 to below 0.5 is 1
    RewardText(step=0.1).of(0.73)               # "reward:0.7"

Rewards-in-Context (arXiv 2402.10207) writes rewards into prompts as numbers, SteerLM (arXiv 2310.05344) as whole ones.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ochat.text.attributes import AttributeFormat

FIELD = "reward"


@dataclass(frozen=True)
class RewardText:
    """Either rising `edges`, of which one that a reward equals belongs to the bin above, or the `step` to round to."""

    edges: tuple[float, ...] = ()
    step: float = 0.0
    attributes: AttributeFormat = AttributeFormat()

    @classmethod
    def of_manifest(cls, described: Mapping[str, Any], attributes: AttributeFormat) -> RewardText:
        """What `to_dict` made."""
        return cls(tuple(described.get("edges", ())), described.get("step", 0.0), attributes)

    def to_dict(self) -> dict[str, Any]:
        """What a manifest and an export keep: the boundaries, and the names of the bins from the lowest on."""
        if self.step:
            return {"field": FIELD, "step": self.step}
        names = [self._named(number) for number in range(len(self.edges) + 1)]
        return {"field": FIELD, "edges": list(self.edges), "names": names}

    def of(self, reward: float) -> str:
        """The condition of an answer with this reward."""
        if not self.step:
            return self._named(bisect.bisect_right(self.edges, reward))
        step = Decimal(repr(self.step))
        return self._named(float((Decimal(repr(reward)) / step).to_integral_value() * step))

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The conditions among `names` that it writes, from the lowest on."""
        before, _, after = self.attributes.each.replace("{name}", FIELD, 1).partition("{value}")
        values = {name: _number(name.removeprefix(before).removesuffix(after)) for name in names}
        written = {name: value for name, value in values.items() if value is not None and self._named(value) == name}
        return sorted(written, key=lambda name: written[name])

    def _named(self, value: float) -> str:
        return self.attributes.one(FIELD, value + 0.0, FIELD)  # no -0


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
