"""`ochat prepare --describe FILE`: a first version of the file for --map, from the first records of a file or folder.

print(describe("chats.jsonl"))
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import tomli_w

from ochat.data.inputs import find_inputs
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text.fields import as_rows, shorten
from ochat.text.fields import describe as kind_of
from ochat.text.records.keys import ANSWERS, CALL, CLASS_LIKE, MESSAGE, PART, RECORD
from ochat.text.records.levels import Level
from ochat.text.records.messages import CALLS, ROLES

RECORDS = 1000  # that are read
SHOWN = 100  # keys
GAP = "  "
REFUSED = f"{GAP}refused: "
MAX_CLASSES = 20  # different values that a column of classes or roles may have
SAID = ("messages", "question", "extra", "answer", "history")  # meanings of columns that may hold messages
CALL_KEYS = ("tool_calls", "function_call")
EXPERT, OTHER = "GPT4", "GPT3"
BAD = re.compile("reject|negative|non_")  # in the name of a column of worse answers
NUMBERED = re.compile("(response|answer|completion|conversation|output|human_ref|message)_?([0-9]+|[a-zA-Z])")


def describe(path: str | Path) -> str:
    """TOML for --map: what was found, as comments, and a guess. Raises: DataError if no record can be read."""
    records = []
    files = map(RecordFile, find_inputs([path]).paths)
    for record in itertools.islice(itertools.chain.from_iterable(files), RECORDS):
        try:
            records.append(record.value())
        except DataError:
            continue
    if not records:
        raise DataError(f"{path}: none of the first {RECORDS} records can be read; `ochat prepare` says why")
    columns = _by_key(records)
    guess = _guess(columns)
    known = {name for meaning in SAID for name in RECORD.names(meaning)}
    turns = _by_key(_under(columns, {*known, *ANSWERS.names, guess.get("messages")}))
    is_pairs = not set(turns).isdisjoint(RECORD.names("answer")) and set(turns).isdisjoint(MESSAGE.names("role"))
    guess = _guess_of_turns(turns) | guess if turns and not is_pairs else guess
    parts = _by_key(_under(turns, {*MESSAGE.names("content"), guess.get("content")}))
    calls = _by_key(_under(columns, CALL_KEYS) + _under(turns, CALL_KEYS))
    lines = [f"# {path}: the keys of its first {len(records):,} records", *_table(columns, RECORD)]
    for title, keys, level in (
        ("the messages", turns, RECORD if is_pairs else MESSAGE),
        ("their content parts", parts, PART),
        ("the calls of tools", calls, CALL),
        ("the functions in these calls", _by_key(_under(calls, {"function"})), CALL),
    ):
        lines += ["#", f"# keys of {title}", *_table(keys, level)] if keys else []
    if guess:
        lines += ["", '# A guess: check it, then ochat prepare --map THIS_FILE. A class of "" is none.']
    elif any(REFUSED in line for line in lines):
        lines += ["", "# No map helps with what is refused: take it out, or --ignore KEY."]
    else:
        lines += ["", "# No map is needed."]
    return "\n".join([*lines, tomli_w.dumps(guess)])


def _by_key(objects: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of each key."""
    found: dict[str, list[Any]] = defaultdict(list)
    for row in objects:
        for key, item in row.items():
            found[key].append(item)
    return found


def _rows(value: Any) -> list[dict[str, Any]]:
    """An object, or those of a list or of an object of lists; [] for anything else."""
    try:
        rows = as_rows(value, "")
    except DataError:
        return []
    return [row for row in (rows if isinstance(rows, list) else [rows]) if isinstance(row, dict)]


def _under(keys: dict[str, list[Any]], names: Container[str | None]) -> list[dict[str, Any]]:
    """The objects in the values of those keys that are named."""
    return [row for name in keys if name in names for value in keys[name] for row in _rows(value)]


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


def _guess(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """What the columns of records are that the table of keys does not know, as a map has it."""
    guess: dict[str, Any] = {}
    answers = _answers(columns)
    if not answers and not columns.keys() & {*RECORD.names("messages"), *RECORD.names("answer")}:
        lists = [name for name, values in columns.items() if any(_are_turns(value) for value in values)]
        if lists:
            guess["messages"] = lists[0]
        elif columns.keys() & {*RECORD.names("question")}:
            guess = dict(zip(["answer"], _longest(columns, RECORD, 1), strict=False))
        else:
            guess = _question_and_answer(columns, RECORD)
    if "condition" not in columns and not answers and (rule := _class_rule(columns)):
        guess["condition"] = rule
    return guess | ({"answers": answers} if answers else {})


def _guess_of_turns(turns: dict[str, list[Any]]) -> dict[str, Any]:
    """The same of the keys of messages, and the roles that are not known."""
    guess: dict[str, Any] = {}
    different = {name: list(dict.fromkeys(map(str, values))) for name, values in turns.items()}
    role = next((name for name in turns if name in MESSAGE.names("role")), "")
    if not role:
        few = [name for name in turns if 1 < len(different[name]) <= MAX_CLASSES]
        role = min(few, key=lambda name: (len(different[name]), len(str(turns[name]))), default="")
        guess = {"role": role} if role else _question_and_answer(turns, MESSAGE)
    if role and set(turns).isdisjoint(MESSAGE.names("content")):
        others = {name: values for name, values in turns.items() if name != role}
        guess |= dict(zip(["content"], _longest(others, MESSAGE, 1), strict=False))
    names = [name for name in different.get(role, []) if name.strip().lower() not in CALLS]
    new = [name for name in names if name.strip().lower() not in ROLES]
    if 0 < len(new) <= MAX_CLASSES:
        known = {ROLES.get(name.strip().lower()) for name in names}
        free = [each for each in ("user", "assistant") if each not in known]  # the first to speak asks
        guess["roles"] = dict(itertools.zip_longest(new, free[: len(new)], fillvalue="user"))
    return guess


def _question_and_answer(columns: dict[str, list[Any]], level: Level) -> dict[str, str]:
    texts = _longest(columns, level, 2)
    return dict(zip(("question", "answer"), texts, strict=True)) if len(texts) == 2 else {}


def _longest(columns: dict[str, list[Any]], level: Level, number: int) -> list[str]:
    """The columns with the most text, in their order, of those that the table of keys does not know."""
    unknown = {name: values for name, values in columns.items() if name not in level.meanings}
    texts = [name for name, values in unknown.items() if all(map(_is_text, values))]
    most = sorted(texts, key=lambda name: -sum(len(str(value)) for value in columns[name]))[:number]
    return [name for name in columns if name in most]


def _is_text(value: Any) -> bool:
    """Whether it may be what somebody says: text, or content parts."""
    return isinstance(value, str) or any("text" in row for row in _rows(value))


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
