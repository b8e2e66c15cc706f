"""Write files and folders atomically: a reader, or a machine that stops, sees the old one or the new one.

    atomic.write_json(folder / "config.json", record)
    with atomic.staging_dir(Path("data/a")) as folder: ...; folder.rename("data/a")
    atomic.replace_dir(Path("checkpoints/.step_5.tmp"), Path("checkpoints/step_5"))

A file is written under a temporary name, synced and renamed. What a killed process left half written has a name that
starts with a dot; the next start removes it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ochat.errors import ConfigError

MAX_NAME_BYTES = 255  # of every file system in use


def check_writable(*paths: Path | None) -> None:
    """Raises ConfigError unless each file could be written; None means no file."""
    for path in filter(None, paths):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: cannot be written; name a file in a folder that exists")


def write_json(path: Path, record: Mapping[str, Any], *, indent: int = 2) -> None:
    """Write a JSON object as a readable UTF-8 file. Raises: OSError."""
    write_text(path, json.dumps(record, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file with the line ends of `text`. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Sync a finished file or folder, then give it its name. Raises: OSError."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file_name(name: Any) -> bool:
    """Whether this is the name of a file in some folder, without a path to elsewhere."""
    is_plain = isinstance(name, str) and "\0" not in name and Path(name).name == name
    return is_plain and 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES


def replace_dir(temporary: Path, final: Path) -> None:
    """Rename a finished folder, whose files are synced, to `final`; a damaged folder there is removed first."""
    if final.exists():
        remove_dir(final)
    replace(temporary, final)


def remove_dir(folder: Path) -> None:
    """Remove a folder; a kill in the middle leaves nothing under its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path, prefix: str) -> None:
    """Remove what a killed process left of the folders below `root` whose names start with `prefix`."""
    for left in [*root.glob(f".{prefix}*.tmp"), *root.glob(f".{prefix}*.old")]:
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staging_dir(output: Path) -> Iterator[Path]:
    """An empty folder next to `output`, named `.NAME.partial-PID`, to be renamed; removed at the end unless it was.

    An error, Ctrl-C and SIGTERM remove it at once; the next start for the same output removes what a killed process
    left. Raises: ConfigError where no folder can be made; SystemExit(143) at a SIGTERM.
    """
    if output.name in ("", ".."):
        raise ConfigError(f"{str(output)!r} names no new folder; give one")
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    with _sigterm_exits():
        try:
            _remove_stale(output)
            _make(folder, output)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(output: Path) -> None:
    """Remove staging folders of `output` whose process is gone; one with our number is gone too."""
    start = f".{output.name}.partial-"
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        number = path.name.removeprefix(start)
        if path.name.startswith(start) and number.isdigit() and not _is_another_process(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _make(folder: Path, output: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise ConfigError(f"{output}: cannot be written ({why}); name a folder that can") from None


def _is_another_process(number: int) -> bool:
    try:
        os.kill(number, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return number != os.getpid()


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Turn SIGTERM into SystemExit so that cleanup runs. Python delivers signals to its main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleanup
    raise SystemExit(128 + number)
