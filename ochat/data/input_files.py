"""The files that `--input` names: files as they are, and of a folder all files with known endings below it, in order.

files = find(["a.jsonl", "chats/"]); files.paths, files.skipped
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ochat.data import parquet
from ochat.data.records import Record, RecordFile
from ochat.errors import DataError

T = TypeVar("T")

TEXTS = (".jsonl", ".ndjson", ".json")
ENDINGS = (*TEXTS, *(text + packed for text in TEXTS for packed in (".gz", ".xz", ".zst")), ".parquet")


class InputFiles(NamedTuple):
    """Files to read, in order, and those of the folders that are none, a README say."""

    paths: list[Path]
    skipped: list[Path]


def find(inputs: Sequence[str | Path]) -> InputFiles:
    """The files of all inputs. A folder's come sorted by their paths, the same on every machine; hidden ones do not.

    Raises: DataError for a folder without a file to read; whether files exist is told when they are opened.
    """
    found = InputFiles([], [])
    for path in map(Path, inputs):
        if path.is_dir():
            _add_folder(path, found)
        else:
            found.paths.append(path)
    return found


def parse_records(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[tuple[Record, T]]:
    """The records of a file, or of all files in a folder, each with what `parse` makes of it.

    Raises: DataError naming file and line, also for one that `parse` raises.
    """
    for file in find([path]).paths:
        for record in read_records(file):
            value = record.value()
            try:
                parsed = parse(value)
            except DataError as error:
                raise DataError(f"{record.place}: {error}") from None
            yield record, parsed


def _add_folder(folder: Path, found: InputFiles) -> None:
    files = sorted(_visible_files(folder), key=lambda path: path.relative_to(folder).parts)
    known = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if not known:
        what = f"only {', '.join(path.name for path in files[:5])}" if files else "no file"
        raise DataError(f"{folder}: nothing to read in this folder ({what}); known endings: {', '.join(ENDINGS)}")
    found.paths.extend(known)
    found.skipped.extend(path for path in files if path not in set(known))


def _visible_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def read_records(path: str | Path) -> RecordFile:
    """The records of a JSON Lines, JSON or Parquet file, in order. Memory: one record and a few megabytes."""
    file = RecordFile(path)
    return parquet.ParquetFile(path) if parquet.is_parquet(file.path) else file
