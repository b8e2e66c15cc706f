"""Give turns the weights that their record lists.

    turns = weighted(turns, fields)     # of {"messages": ..., "weights": [0, 1], "train": true}

A list weighs each message; the record's own weight multiplies all of them, and those of their spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ochat.errors import DataError
from ochat.text.conversation import Message, default_weight
from ochat.text.fields import check_number, describe
from ochat.text.records.messages import Turn
from ochat.text.records.objects import Fields, check_truth


def weighted(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns with the weights that the record lists, each multiplied by the record's own. Raises: DataError."""
    if "weights" in fields:
        turns = _with_list(turns, fields.name("weights"), fields.list("weights"), check_number)
    if "mask" in fields:
        turns = _with_list(turns, fields.name("mask"), _mask(turns, fields), check_truth)
    turns = [_untrained(turn) if turn.is_prompt else turn for turn in turns]
    scale, name = fields.weight(), fields.name("weight")
    return turns if scale is None else [turn._replace(message=_scaled(turn.message, scale, name)) for turn in turns]


def _untrained(turn: Turn) -> Turn:
    is_answer = turn.message.role == "assistant" and turn.message.weight is None
    return turn._replace(message=replace(turn.message, weight=0.0)) if is_answer else turn


def _mask(turns: list[Turn], fields: Fields) -> list[Any]:
    """The mask of each message, None where it says nothing. NeMo names the role that is not trained."""
    mask, name = fields.values["mask"], fields.names["mask"]
    if not isinstance(mask, str) or not mask.strip().isalpha():
        return fields.list("mask")
    if mask.strip().lower() not in ("user", "human"):
        raise DataError(f"{name}: {describe(mask)} is not read, only User or a list of 1 and 0; write loss_mask")
    return [0 if turn.message.role == "user" else None for turn in turns]


def _with_list(turns: list[Turn], name: str, values: list[Any], check: Callable[[Any, str], float]) -> list[Turn]:
    if len(values) != len(turns):
        raise DataError(f"{name}: {len(values)} values for {len(turns)} messages; one for each is needed")
    found = []
    for i, (turn, value) in enumerate(zip(turns, values, strict=True)):
        if value is not None:
            own = 1.0 if turn.message.weight is None else turn.message.weight
            weight = check_number(own * check(value, f"{name}[{i}]"), f"{name}[{i}]")
            turn = turn._replace(message=replace(turn.message, weight=weight))
        found.append(turn)
    return found


def _scaled(message: Message, scale: float, name: str) -> Message:
    weight = default_weight(message.role) or None if message.weight is None else message.weight
    weight = None if weight is None else check_number(weight * scale, name)
    spans = (span._replace(weight=check_number(span.weight * scale, name)) for span in message.spans)
    return replace(message, weight=weight, spans=tuple(spans))
