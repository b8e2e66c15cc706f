"""The files that `--input` names: files, folders, their classes, and what the names of folders say.

    found = find_inputs(["a.jsonl", "gpt4.jsonl::GPT4", "chats/"])       # found.paths, found.conditions, found.skipped
    folder_columns(Path("chats/model=gpt-4/0.parquet"))                  # {"model": "gpt-4"}

Of a folder all files with known endings are read, but for those of a test or validation split, as the hub names them:
data/test-00000-of-00001.parquet, validation/x.jsonl, my_eval.jsonl. A file that is named itself is always read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from ochat.errors import DataError
from ochat.text.fields import has_surrogate

TEXTS = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".bz2", ".xz", ".zst")
ENDINGS = (*TEXTS, *(text + packed for text in TEXTS for packed in PACKED), ".parquet", ".arrow", ".feather")
# what `datasets` and the hub write beside the records; and what datasets leaves behind after a map
NO_RECORDS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json|cache-.*\.arrow|tmp.*\.arrow")
OTHER_SPLITS = {
    *("test", "tests", "testing", "testset", "valid", "validation", "val", "dev", "devset", "eval", "evaluation"),
    *("held", "heldout", "holdout"),
}
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class InputFiles(NamedTuple):
    """Files to read, in order, each with its class ("": none is given); and of the input folders the files of other
    splits, and those that hold no records, such as a README."""

    paths: list[Path]
    conditions: list[str]
    other_splits: list[Path]
    skipped: list[Path]


def find_inputs(inputs: Sequence[str | Path], *, all_splits: bool = False) -> InputFiles:
    """The files that the inputs name: files as they are; those of a folder sorted by their paths, the same on every
    machine, without hidden ones. An input "PATH::CLASS" gives its files a class.

    Raises: DataError for a folder without a file to read, for a file that comes twice, and for a name that is no UTF-8
    text; a missing file is reported
    when it is opened.
    """
    found = InputFiles([], [], [], [])
    for given in map(str, inputs):
        name, condition = _split_class(given)
        path = Path(name)
        files = _of_folder(path, found, all_splits) if path.is_dir() else [path]
        found.paths.extend(files)
        found.conditions.extend([condition] * len(files))
    for name in map(str, (*found.paths, *found.other_splits, *found.skipped)):
        if has_surrogate(name):
            raise DataError(
                f"--input {ascii(name)}: the name is no UTF-8 text, and a data set names its files; rename it"
            )
    seen: set[str] = set()
    for path in map(os.path.abspath, found.paths):
        if path in seen:
            raise DataError(f"{path}: comes twice in --input; name it once")
        seen.add(path)
    return found._replace(other_splits=[path for path in found.other_splits if os.path.abspath(path) not in seen])


def _split_class(given: str) -> tuple[str, str]:
    """Path and class of an input. A file whose name holds "::" is a file."""
    if Path(given).exists():
        return given, ""
    if "::" not in given:
        name, _, condition = given.rpartition(":")
        if name and Path(name).exists():
            raise DataError(f"--input {given}: no such file; a class has two colons in front, {name}::{condition}")
        return given, ""
    name, _, condition = given.rpartition("::")
    if not name or not condition.strip():
        raise DataError(f"--input {given}: PATH::CLASS is needed, such as gpt4.jsonl::GPT4")
    return name, condition.strip()


def _of_folder(folder: Path, found: InputFiles, all_splits: bool) -> list[Path]:
    """The folder's files to read; those that are left out are noted in `found`."""
    files = sorted(_files(folder))
    known, others = [], []
    for file in files:
        parts = file.relative_to(folder).parts
        if "_delta_log" in parts:
            raise DataError(
                f"{file.parent.parent}: a Delta table, which also keeps rows that were deleted; write its rows as "
                "Parquet, and give that folder"
            )
        if not _may_hold_records(parts):
            found.skipped.append(file)
        elif not all_splits and _is_other_split(parts):
            others.append(file)
        else:
            known.append(file)
    if not known:
        what = f"only {', '.join(file.name for file in files[:5])}" if files else "no file"
        splits = "; of test and validation splits only files that --input names are read" if others else ""
        endings = f"; name files in --input, or give them a known ending: {', '.join(ENDINGS)}"
        raise DataError(f"{folder}: nothing to read in this folder ({what}){splits or endings}")
    _check_twice(known)
    found.other_splits.extend(others)
    return known


def _files(folder: Path) -> Iterator[Path]:
    """All that are not hidden, also where links lead, and links that lead nowhere."""
    seen: set[str] = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        is_new = (real := os.path.realpath(name)) not in seen  # else a link leads back
        seen.add(real)
        folders[:] = [each for each in folders if is_new and not each.startswith(".")]
        yield from (Path(name, file) for file in files if is_new and not file.startswith("."))


def _may_hold_records(parts: tuple[str, ...]) -> bool:
    """False for what begins with "_" too, such as what Spark leaves behind."""
    name = parts[-1].lower()
    is_known = name.endswith(ENDINGS) and not NO_RECORDS.fullmatch(name)
    return is_known and not any(part.startswith("_") for part in parts)


def _is_other_split(parts: tuple[str, ...]) -> bool:
    """Whether a folder's name, or the file's, begins or ends with the name of another split, and none says `train`."""
    names = [re.findall(r"[a-z]+", name.lower()) for name in (*parts[:-1], _stem(parts[-1]))]
    names = [[word for word in words if word != "of"] for words in names]
    ends = {word for words in names if words for word in (words[0], words[-1])}
    return bool(ends & OTHER_SPLITS) and not ends & {"train", "training"}


def _stem(name: str) -> str:
    """The name without its ending."""
    return name[: -max(len(ending) for ending in ENDINGS if name.lower().endswith(ending))]


def _check_twice(files: list[Path]) -> None:
    """Raises: DataError for a file that is there in two forms, such as plain and compressed."""
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.with_name(_stem(file.name)), file)
        if other is not file:
            raise DataError(f"{other} and {file}: the same file in two forms? take one away, or name both in --input")


def missing_parts(paths: Iterable[Path]) -> list[str]:
    """Of files that are numbered parts, as train-00000-of-00002.parquet, those that do not come all, in words."""
    parts: Counter[tuple[Path, int]] = Counter()
    for path in paths:
        if found := re.match(r"(.+)-\d{5}-of-(\d{5})", path.name):
            parts[path.with_name(found[1]), int(found[2])] += 1
    return [f"{name}-*: {count} of {of} parts" for (name, of), count in parts.items() if count < of]


def folder_columns(path: Path) -> dict[str, Any]:
    """The columns that the names of a file's folders give all of its records, as Hive writes them: `model=gpt-4`.

    Numbers, true and false have the types of JSON. Raises: DataError for two values of one column.
    """
    found: dict[str, Any] = {}
    for part in path.parts[:-1]:
        name, equals, text = map(unquote, part.partition("="))
        if name and equals:
            value = None if text == NO_VALUE else _typed(text)
            if found.setdefault(name, value) != value:
                raise DataError(f"{path}: two of its folders give {name}; rename one")
    return found


def _typed(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)) else text
