"""Read the several answers of one record, each in a column of its own: `chosen` and `rejected`.

    answered(reader, ["chosen", "rejected"])       # {"chosen": turns, "rejected": turns}

A column holds a whole conversation, or an answer to the prompt that the record or another column has.
"""

from __future__ import annotations

from collections.abc import Iterable

from ochat.errors import DataError
from ochat.text.fields import shorten
from ochat.text.records.messages import Turn, as_prompt
from ochat.text.records.turns import QUESTION, TurnReader, check_transcript


def answered(reader: TurnReader, columns: Iterable[str]) -> dict[str, list[Turn]]:
    """Column -> the prompt and the answer that the column has, of those columns that the record has.

    What all of them begin with is the prompt, of which nothing is trained. Raises: DataError.
    """
    found = _columns(reader, columns)
    whole = {column: turns for column, turns in found.items() if turns[0].message.role != "assistant"}
    prompt = _prompt(reader, found, whole)
    for column in [column for column in found if column not in whole]:
        if not prompt:
            raise DataError(f"{column}: no question stands before this answer; name its column with --map")
        if prompt[-1].message.role == "assistant":
            place = prompt[-1].place
            raise DataError(
                f"{place}: an answer where {column} should follow; remove it, or name its column in [answers]"
            )
    found = {column: turns if column in whole else prompt + turns for column, turns in found.items()}
    shared = 0 if whole and len(found) == 1 else min(len(prompt), _num_shared(list(found.values())))
    turns = {column: as_prompt(turns[:shared]) + turns[shared:] for column, turns in found.items()}
    reader.check_text_key([turn for each in turns.values() for turn in each])
    return turns


def _columns(reader: TurnReader, columns: Iterable[str]) -> dict[str, list[Turn]]:
    """The turns in each of the columns that the record has."""
    given, columns = list(columns), [column for column in columns if reader.record.get(column) is not None]
    if not columns:
        names = ", ".join(map(shorten, given))
        raise DataError(f"record: it has no answer that the map names ({names}); prepare such files on their own")
    reader.check_alone(columns[0])
    if "answer" in reader.fields:
        raise reader.fields.refusal("answer", "the map names other answers; name it among them")
    found = {c: reader.messages.turns(reader.record[c], c, "assistant", reader.fields.notes) for c in columns}
    if empty := [column for column, turns in found.items() if not turns]:
        raise DataError(f"{empty[0]}: empty; an answer has at least one message")
    return found


def _prompt(reader: TurnReader, found: dict[str, list[Turn]], whole: dict[str, list[Turn]]) -> list[Turn]:
    """The turns before the answers: those of the record, or of the first whole conversation."""
    if whole:
        said = [turn for turns in found.values() for turn in turns]
        for meaning in ("messages", *QUESTION):
            reader.check_said(meaning, said, next(iter(found)))
        return next(iter(whole.values()))[:-1]
    if reader.fields.values.keys().isdisjoint(("messages", *QUESTION)):
        check_transcript(next(iter(found.values()))[0])
    return reader.asked()


def _num_shared(conversations: list[list[Turn]]) -> int:
    """How many messages all have in common at the beginning; the last of each is never counted."""
    shared = 0
    for turns in zip(*(each[:-1] for each in conversations), strict=False):
        if any(turn.message != turns[0].message for turn in turns):
            break
        shared += 1
    return shared
