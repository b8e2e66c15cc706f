"""A folder in the making stands beside its destination as `.NAME.partial-PID` and is gone when its writer is.

    with partial_folder(Path("data/a")) as folder:
        ...; folder.rename("data/a")

An error, Ctrl-C and SIGTERM remove it at once; what a killed process left goes with the next one's start.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ochat.errors import ConfigError


@contextmanager
def partial_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, removed at the end unless it was renamed.

    Raises: ConfigError where there can be none; SystemExit(143) at a SIGTERM.
    """
    if output.name in ("", ".."):
        raise ConfigError(f"{str(output)!r} names no new folder; give one")
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    with _sigterm_exits():
        try:
            sweep(output)
            _make(folder, output)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove the partial folders of `output` whose process is gone, or has our number and so is gone too."""
    start = f".{output.name}.partial-"
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        number = path.name.removeprefix(start)
        if path.name.startswith(start) and number.isdigit() and not _is_another_process(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _make(folder: Path, output: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written ({error.filename}: {error.strerror}); name a folder that can"
        ) from None


def _is_another_process(number: int) -> bool:
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM as SystemExit, so that what is open is closed. Python hands signals to its main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise SystemExit(128 + number)
