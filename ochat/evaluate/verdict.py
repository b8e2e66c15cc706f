"""Say in words what a swap matrix shows: whether the prefix of a class makes the answers of that class likelier.

    verdict(record["classes"], expert="GPT4")
    # The prefix works. Answers of GPT4 are likelier under their own prefix than under GPT3's by 0.319 nats a token
    # [0.271, 0.367]; those of GPT3 than under GPT4's by 1.516 [1.401, 1.620].

It holds for a class where the whole interval of the paired difference is above 0 (swap.summarise: nll_above_own). With
several other prefixes the one counts whose interval begins lowest, so what is said holds against all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ochat.evaluate.swap import NONE

FEW = 50  # conversations below which the intervals are too narrow by more than swap.py allows itself
SMALL = 0.01  # nats a token: one percent of a token's likelihood


@dataclass(frozen=True)
class Gap:
    """How much likelier the answers of a class are under its own prefix than under another one, in nats a token."""

    name: str
    other: str
    conversations: int
    nats: float
    interval: tuple[float, float] | None  # None: of one conversation

    @property
    def sign(self) -> int:
        """1: likelier under its own prefix, -1: under the other one, 0: that is open."""
        low, high = self.interval or (0.0, 0.0)
        return (low > 0) - (high < 0)

    def __str__(self) -> str:
        turn = -1 if self.nats < 0 else 1
        ends = ", ".join(f"{each:.3f}" for each in sorted(turn * each for each in self.interval or ()))
        shown = f"[{ends}]" if ends else "(one conversation: no interval)"
        how, is_open = "likelier" if turn > 0 else "less likely", ", which includes 0" * (ends != "" and not self.sign)
        other = f"{self.other or NONE}'s"
        return (
            f"{how} under their own prefix than under {other} by {turn * self.nats:.3f} nats a token {shown}{is_open}"
        )


def verdict(classes: Mapping[str, Any], expert: str = "") -> str:
    """The sentences. `classes`: what swap.summarise returns; `expert`: the class that is named first, if it is there.

    They say what is open where an interval includes 0, and where conversations are few.
    """
    found = gaps(classes)
    if not found:
        return (
            "Nothing is compared: that takes answers of a class, the prefix of that class and another prefix "
            "(--conditions names prefixes; a template without classes has none)."
        )
    found.sort(key=lambda gap: gap.name != expert)
    shown = "; ".join(f"answers of {gap.name or NONE} are {gap}" for gap in found)
    return " ".join(filter(None, (_finding(found), f"{shown[0].upper()}{shown[1:]}.", _few(found), _advice(found))))


def gaps(classes: Mapping[str, Any]) -> list[Gap]:
    """A gap for each class that was measured under its own prefix and another."""
    found = []
    for name, row in classes.items():
        others = {p: cell for p, cell in row["prefixes"].items() if p != name and cell["nll_above_own"] is not None}
        each = [
            Gap(name, other, row["conversations"], cell["nll_above_own"], _ends(cell["nll_above_own_interval"]))
            for other, cell in others.items()
        ]
        if each:
            found.append(min(each, key=lambda gap: gap.interval[0] if gap.interval else gap.nats))
    return found


def _finding(found: Sequence[Gap]) -> str:
    signs = {gap.sign for gap in found}
    if signs == {1}:
        return "The prefix works." if max(gap.nats for gap in found) >= SMALL else "The prefix hardly changes anything."
    if signs == {0}:
        return "The prefix changes nothing yet that these conversations show."
    if signs == {0, 1}:
        return f"The prefix works for {_names(found, 1)}; for {_names(found, 0)} that is open."
    if signs == {-1}:
        return f"The prefix works the wrong way for {_names(found, -1)}."
    alone = f": it works for {_names(found, 1)} alone" if 1 in signs else ""
    return f"The prefix does not tell the classes apart yet{alone}."


def _few(found: Sequence[Gap]) -> str:
    few = [f"{gap.conversations} of {gap.name or NONE}" for gap in found if gap.conversations < FEW]
    return f"Conversations are few ({', '.join(few)}): the true intervals are wider." if few else ""


def _advice(found: Sequence[Gap]) -> str:
    """What to do where it does not work for every class."""
    if all(gap.sign > 0 and gap.nats >= SMALL for gap in found):
        return ""
    weak = [gap for gap in found if gap.sign <= 0 or gap.nats < SMALL]
    names = " and ".join(gap.name or NONE for gap in weak)
    if all(gap.sign == 0 and gap.conversations < FEW for gap in weak):
        return f"Hold out more conversations of {names}; then train longer, or raise their share."
    if all(gap.sign < 0 for gap in found):
        return "Look at which conversations have which class; if they are right, train longer."
    return f"Train longer, or raise the share or the weight of {names}."


def _names(found: Sequence[Gap], sign: int) -> str:
    return " and ".join(gap.name or NONE for gap in found if gap.sign == sign)


def _ends(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (interval[0], interval[1]) if interval else None
