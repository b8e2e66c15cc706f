"""`ochat prepare --describe FILE`: a first version of the file for --map, from the first records of a file or folder.

print(describe("chats.jsonl"))
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import tomli_w

from ochat.data.inputs import find_inputs
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text.fields import as_rows, shorten
from ochat.text.fields import describe as kind_of
from ochat.text.records.keys import ANSWERS, CLASS_LIKE, MESSAGE, RECORD
from ochat.text.records.levels import Level
from ochat.text.records.messages import ROLES

RECORDS = 1000  # that are read
SHOWN = 100  # keys
GAP = "  "
REFUSED = f"{GAP}refused: "
MAX_CLASSES = 20  # different values that a column of classes may have
EXPERT, OTHER = "GPT4", "GPT3"
BAD = re.compile("reject|negative|non_")  # in the name of a column of worse answers
NUMBERED = re.compile("(response|answer|completion|conversation|output|human_ref|message)_?([0-9]+|[a-zA-Z])")


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
            for turn in _rows(item) if RECORD.meanings.get(key) != "tools" else ():
                for name, said in turn.items():
                    turns[name].append(said)
    if not total:
        raise DataError(f"{path}: none of the first {RECORDS} records can be read; `ochat prepare` says why")
    lines = [f"# {path}: the keys of its first {total:,} records", *_table(columns, RECORD)]
    if turns:
        lines += ["#", "# keys of the messages", *_table(turns, MESSAGE)]
    guess = _guess(columns, turns)
    if guess:
        lines += ["", '# A guess: check it, then ochat prepare --map THIS_FILE. A class of "" is none.']
    elif any(REFUSED in line for line in lines):
        lines += ["", "# No map helps with what is refused: take it out, or --ignore KEY."]
    else:
        lines += ["", "# No map is needed."]
    return "\n".join([*lines, tomli_w.dumps(guess)])


def _rows(value: Any) -> list[dict[str, Any]]:
    """The objects in a list of them, also in an object of lists; [] for anything else."""
    try:
        rows = as_rows(value, "")
    except DataError:
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _table(columns: dict[str, list[Any]], level: Level) -> list[str]:
    """A line for each key, of many for those that come most often."""
    most = sorted(sorted(columns, key=lambda name: -len(columns[name]))[:SHOWN])
    width = max(len(shorten(name)) for name in most)
    lines = [
        f"#   {shorten(name):{width}}  {len(columns[name]):>6,}{GAP}{_meaning(name, columns[name], level)}"
        for name in most
    ]
    return [*lines, *([f"#   and {len(columns) - SHOWN:,} more"] if len(columns) > SHOWN else [])]


def _meaning(name: str, values: list[Any], level: Level) -> str:
    try:
        meaning = next(filter(None, (level.meaning(name, value) for value in values)), "")
    except DataError as error:
        return f"refused: {str(error).removeprefix(f'{shorten(name)}: ')}"
    if meaning == "label" and any(isinstance(value, int | float) and value in (0, 1) for value in values):
        return f"refused without a map: {level.by_name[name].text}"
    if meaning and meaning != "label":
        return f"read as {meaning}"
    example = kind_of(next((value for value in values if value is not None), None)).replace("\n", " ")
    different = len({str(value) for value in values})
    return f"ignored, {example}, {different:,} different values" if different > 1 else f"ignored, {example}"


def _guess(columns: dict[str, list[Any]], turns: dict[str, list[Any]]) -> dict[str, Any]:
    guess: dict[str, Any] = {}
    known = RECORD.meanings.keys() & columns
    answers = _answers(columns)
    if not known & {*RECORD.names("messages"), *RECORD.names("answer")} and not answers:
        lists = [name for name, values in columns.items() if any(_are_turns(value) for value in values)]
        if lists:
            guess["messages"] = lists[0]
        elif known & {*RECORD.names("question")}:
            texts = _longest({name: values for name, values in columns.items() if name not in RECORD.meanings}, 1)
            guess |= {"answer": texts[0]} if texts else {}
        elif len(texts := _longest(columns)) > 1:
            guess |= {"question": texts[0], "answer": texts[1]}
    if turns and not set(turns) & {*MESSAGE.names("role"), *RECORD.names("answer")}:
        different = {name: len({str(value) for value in values}) for name, values in turns.items()}
        roles = [name for name in turns if 1 < different[name] <= len(ROLES)]
        role = min(roles, key=lambda name: (different[name], len(str(turns[name]))), default="")
        texts = _longest({name: values for name, values in turns.items() if name != role}, 1 if role else 2)
        if role:
            guess |= {"role": role} | ({"content": texts[0]} if texts else {})
        elif len(texts) > 1:
            guess |= {"question": texts[0], "answer": texts[1]}
    if "condition" not in columns and not answers and (rule := _class_rule(columns)):
        guess["condition"] = rule
    return guess | ({"answers": answers} if answers else {})


def _longest(columns: dict[str, list[Any]], number: int = 2) -> list[str]:
    """The columns with the most text, in their order."""
    texts = [name for name, values in columns.items() if all(isinstance(value, str) for value in values)]
    most = sorted(texts, key=lambda name: -sum(map(len, columns[name])))[:number]
    return [name for name in columns if name in most]


def _answers(columns: dict[str, list[Any]]) -> dict[str, str]:
    """The class of each column that is one of several answers, {} where there is one answer."""
    known = [name for name in columns if name in ANSWERS.names]
    good = [name for name in known if not BAD.search(name)]
    if known and not good:
        good = [name for name in columns if RECORD.meanings.get(name) in ("messages", "answer")][:1]
        return dict.fromkeys(good, EXPERT) | dict.fromkeys(known, OTHER)
    if known:
        return {name: OTHER if BAD.search(name) else EXPERT for name in known}
    numbered: dict[str, list[str]] = defaultdict(list)  # response_1 and response_2, human_ref_A and human_ref_B
    for name, values in columns.items():
        if NUMBERED.fullmatch(name) and isinstance(values[0], str | list):
            numbered[NUMBERED.sub(r"\1", name)].append(name)
    return next((dict.fromkeys(names, "") for names in numbered.values() if len(names) > 1), {})


def _are_turns(value: Any) -> bool:
    rows = _rows(value)
    return bool(rows) and all(len(turn) > 1 for turn in rows)


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
