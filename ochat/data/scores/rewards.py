"""Rewards from a file of their own: a record id and a number in each of its records, JSON Lines or Parquet.

    rewards = read_rewards(Path("rewards.jsonl"), ["chats.jsonl"])     # {"record_id": "chats.jsonl:7", "reward": 0.5}
    rewards.of("chats.jsonl", 7, 1)                                    # [0.5]

Other keys are left out: `conversations.parquet` of `ochat score` with a column `reward` is such a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.data.readers import parse_records
from ochat.data.records import Record
from ochat.data.scores.record_ids import RecordIndex, split_id
from ochat.errors import DataError
from ochat.text.fields import check_number


@dataclass(frozen=True)
class Rewards:
    """Rewards of records. `names`: input file -> its name among the ids."""

    path: Path
    names: Mapping[str, str]
    index: RecordIndex
    values: Sequence[float]

    def of(self, file: str, line: int, count: int) -> list[float]:
        """Those of a record's `count` conversations. Raises: DataError, without the place, unless each has one."""
        rows = self.index.rows(self.names[file], line)
        if len(rows) != count:
            has = f"{len(rows)} of this record's {count} conversations" if rows else "no reward of this record"
            raise DataError(f"reward: {self.path} has {has}; add it, or leave the record out of the input")
        return [self.values[row] for row in rows]

    def put(self, record: Record) -> dict[str, Any]:
        """The value of a record of one conversation, with its reward in place of its own. Raises: DataError."""
        return record.value() | {"reward": self.of(record.file, record.line, 1)[0]}


def read_rewards(path: Path, inputs: Sequence[str]) -> Rewards:
    """Of the records of these input files. Raises: DataError naming file and line of what is no reward, for an id that
    comes twice, and for an input file of which there is none."""
    found = [(record_id, reward) for _, (record_id, reward) in parse_records(path, _reward)]
    index = RecordIndex([record_id for record_id, _ in found], str(path))
    return Rewards(path, index.matches(inputs), index, [reward for _, reward in found])


def _reward(value: dict) -> tuple[str, float]:
    for name in ("record_id", "reward"):
        if value.get(name) is None:
            raise DataError(f'{name}: missing or null; each record is {{"record_id": "FILE:LINE", "reward": NUMBER}}')
    if not isinstance(value["record_id"], str):
        raise DataError(f"record_id: text is needed, as FILE:LINE, not {value['record_id']!r}")
    split_id(value["record_id"])
    return value["record_id"], check_number(value["reward"], "reward")
