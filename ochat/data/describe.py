"""`ochat prepare --describe FILE`: a first version of the file for --map, from the first records of a file or folder.

print(describe("chats.jsonl"))
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import tomli_w

from ochat.data.inputs import find_inputs
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text.fields import describe as kind_of
from ochat.text.fields import shorten
from ochat.text.records.keys import CLASS_LIKE, MESSAGE, RECORD, Key, Level, looks_like_weight
from ochat.text.records.messages import ROLES

RECORDS = 1000  # that are read
MAX_CLASSES = 20  # different values that a column of classes may have
EXPERT, OTHER = "GPT4", "GPT3"


def describe(path: str | Path) -> str:
    """TOML for --map: what was found, as comments, and a guess. Raises: DataError if no record can be read."""
    columns: dict[str, list[Any]] = defaultdict(list)
    turns: dict[str, list[Any]] = defaultdict(list)
    total = 0
    files = map(RecordFile, find_inputs([path]).paths)
    for record in itertools.islice(itertools.chain.from_iterable(files), RECORDS):
        try:
            value = record.value()
        except DataError:
            continue
        total += 1
        for key, item in value.items():
            columns[key].append(item)
            for turn in item if isinstance(item, list) else ():
                for name, said in turn.items() if isinstance(turn, dict) else ():
                    turns[name].append(said)
    if not total:
        raise DataError(f"{path}: none of the first {RECORDS} records can be read; `ochat prepare` says why")
    lines = [f"# {path}: the keys of its first {total:,} records", *_table(columns, RECORD)]
    if turns:
        lines += ["#", "# keys of the messages", *_table(turns, MESSAGE)]
    guess = _guess(columns, turns)
    comment = ["", '# A guess: check it, then ochat prepare --map THIS_FILE. A class of "" is none.']
    return "\n".join([*lines, *(comment if guess else ["", "# No map is needed."]), tomli_w.dumps(guess)])


def _table(columns: dict[str, list[Any]], level: Level) -> list[str]:
    width = max(len(shorten(name)) for name in columns)
    return [
        f"#   {shorten(name):{width}}  {len(values):>6,}  {_meaning(name, values, level)}"
        for name, values in sorted(columns.items())
    ]


def _meaning(name: str, values: list[Any], level: Level) -> str:
    try:
        key: Key | None = level.of(name)
    except DataError as error:
        return f"refused: {error}"
    example = kind_of(next((value for value in values if value is not None), None)).replace("\n", " ")
    if key and key.meaning == "label" and any(isinstance(value, int | float) and value in (0, 1) for value in values):
        return f"refused without a map: {key.text}"
    if key is None and any(looks_like_weight(name, value) for value in values):
        return "refused: it looks like a weight"
    if key is None or key.meaning == "label":
        different = len({str(value) for value in values})
        return f"ignored, {example}, {different:,} different values" if different > 1 else f"ignored, {example}"
    return f"read as {key.meaning}" if key.meaning else f"refused: {key.text}"


def _guess(columns: dict[str, list[Any]], turns: dict[str, list[Any]]) -> dict[str, Any]:
    guess: dict[str, Any] = {}
    known = {name for name in columns if (key := RECORD.of(name) if name in _READ else None) and key.meaning}
    if not known & {*RECORD.names("messages"), *RECORD.names("answer")} and "chosen" not in columns:
        lists = [name for name, values in columns.items() if any(_are_turns(value) for value in values)]
        texts = [name for name, values in columns.items() if all(isinstance(value, str) for value in values)]
        texts.sort(key=lambda name: -sum(map(len, columns[name])))
        if lists:
            guess["messages"] = lists[0]
        elif len(texts) > 1:
            question, answer = sorted(texts[:2], key=list(columns).index)
            guess |= {"question": question, "answer": answer}
    if turns and not set(turns) & set(MESSAGE.names("role")):
        roles = [name for name, values in turns.items() if 1 < len({str(v) for v in values}) <= len(ROLES)]
        guess |= {"role": roles[0]} if roles else {}
        texts = [name for name in turns if name not in roles and isinstance(turns[name][0], str)]
        guess |= {"content": max(texts, key=lambda name: sum(len(str(v)) for v in turns[name]))} if texts else {}
    if "condition" not in columns and (rule := _class_rule(columns)):
        guess["condition"] = rule
    if "chosen" in columns and "rejected" in columns:
        guess["answers"] = {"chosen": EXPERT, "rejected": OTHER}
    return guess


_READ = {name for key in RECORD.keys for name in key.names}


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and len(turn) > 1 for turn in value)


def _class_rule(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """How a column that tells apart where answers come from becomes classes, {} if there is none."""
    for name in (name for name in CLASS_LIKE if name in columns):
        values = Counter(str(value).lower() if isinstance(value, bool) else str(value) for value in columns[name])
        if len(values) < 2:
            continue
        if set(values) <= {"true", "false", "0", "1"}:
            return {
                "from": name,
                "values": {value: EXPERT if value in ("true", "1") else OTHER for value in sorted(values)},
            }
        if all(isinstance(value, int | float) for value in columns[name]):
            middle = sorted(columns[name])[len(columns[name]) // 2]
            return {"from": name, "bins": [middle], "names": ["low", "high"]}
        if len(values) <= MAX_CLASSES:
            return {"from": name, "values": {value: value for value, _ in values.most_common()}}
    return {}
