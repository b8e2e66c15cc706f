"""Small files that appear whole, and what is known to be on the disk.

    disk.write_json(folder / "config.json", record);  disk.sync(folder);  disk.sha256(path)
A file is written beside its place, synced and renamed: a reader, or a machine that stops, sees the old one or the new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError

MAX_NAME_BYTES = 255  # of every file system in use
THREADS = 4  # that hash files: one is slower than the disks that large models lie on


def check_places(*paths: Path | None) -> None:
    """Raises: ConfigError where no file could be written; None is none that is asked for."""
    for path in filter(None, paths):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: cannot be written; name a file in a folder that exists")


def write_json(path: Path, record: Mapping[str, Any], *, indent: int = 2) -> None:
    """A JSON object as a readable UTF-8 file. Raises: OSError."""
    write_text(path, json.dumps(record, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file with the line ends of `text`. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Gives a finished file or folder its name, once its content is on the disk. Raises: OSError."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's content. Raises: OSError. Costs: reads the file, about 1 s a GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_changed(files: Mapping[Path, str]) -> Path | None:
    """The first file whose sha256 is not what it should be. Raises: OSError. Costs: reads them, THREADS at a time, each
    about 1 s a GB."""
    with ThreadPoolExecutor(THREADS) as pool:
        sums = zip(files.items(), pool.map(sha256, files), strict=True)
        changed = next((path for (path, right), found in sums if found != right), None)
        pool.shutdown(cancel_futures=True)
    return changed


def is_name(name: Any) -> bool:
    """Whether this is the name of a file in some folder, and no way out of it."""
    is_plain = isinstance(name, str) and "\0" not in name and Path(name).name == name
    return is_plain and 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES
