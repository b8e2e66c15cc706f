"""Write files and folders atomically: a reader, or a machine that stops, sees the old one or the new one.

    atomic.write_json(folder / "config.json", record)
    with atomic.staging_dir(Path("data/a")) as folder: ...; folder.rename("data/a")
    atomic.replace_dir(Path("checkpoints/.step_5.tmp"), Path("checkpoints/step_5"))

A file is written under a temporary name, synced and renamed. What a killed process left half written has a name that
starts with a dot; the next start removes it. A link under such a name is removed or refused, never followed: what it
leads to is somebody else's.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ochat.errors import ConfigError

log = logging.getLogger(__name__)
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
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    unlink(temporary)
    temporary.write_bytes(content)
    replace(temporary, path)


def unlink(temporary: Path) -> None:
    """Remove what a killed process, or somebody else, left under the name of a temporary file: a link would be written
    through. Raises: OSError."""
    temporary.unlink(missing_ok=True)


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


def make_dir(folder: Path) -> None:
    """Make a folder to write into, unless it is there. Raises: OSError, also for a link."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "a link, and what it leads to would be written to; remove it", str(folder))


def remove_dir(folder: Path) -> None:
    """Remove a folder; a kill in the middle leaves nothing under its name."""
    hidden = folder.with_name(f".{folder.name}.old")
    remove(hidden)
    os.rename(folder, hidden)
    remove(hidden)


def remove(path: Path) -> None:
    """Remove a folder as far as it can be, or a link to one, of which nothing behind it is touched."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(root: Path, prefix: str) -> None:
    """Remove what a killed process left of the folders below `root` whose names start with `prefix`."""
    for left in [*root.glob(f".{prefix}*.tmp"), *root.glob(f".{prefix}*.old")]:
        remove(left)


@contextmanager
def staging_dir(output: Path) -> Iterator[Path]:
    """An empty folder next to `output`, named `.NAME.partial-PID`, to be renamed; removed at the end unless it was.

    An error, Ctrl-C and SIGTERM remove it at once; the next start for the same output removes what a killed process
    left. Raises: ConfigError where no folder can be made, and for a link; SystemExit(143) at a SIGTERM.
    """
    if output.name in ("", ".."):
        raise ConfigError(f"{str(output)!r} names no new folder; give one")
    if os.path.islink(output):
        raise ConfigError(f"{output}: a link; give the place that it leads to, {output.resolve()}")
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    with _sigterm_exits():
        try:
            _remove_stale(output)
            _make(folder, output)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replaced(output: Path) -> Path:
    """Where what `output` was is moved while another takes its place; the next start removes it as a staging folder."""
    return output.parent / f".{output.name}.replaced-{os.getpid()}"


def _remove_stale(output: Path) -> None:
    """Remove staging and replaced folders of `output` whose process is gone; one with our number is gone too."""
    name = re.compile(re.escape(f".{output.name}.") + r"(?:partial|replaced)-([0-9]+)")
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        if (found := name.fullmatch(path.name)) and not _is_another_process(int(found[1])):
            remove(path)
            log.warning("removed %s, which a process that was killed had left", path)


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
