"""One run at a time on a run folder: a lock on RUN/.lock, which ends with the process that holds it, however it ends.

    with FolderLock(folder, warn) as lock: ...       cat runs/a/.lock  says which process works there, and since when
A POSIX record lock: NFS passes it on between machines, and what the process forks does not hold it. It goes as soon as
the process closes any descriptor of that file, so nothing else here opens it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ochat.errors import ConfigError

NAME = ".lock"
FLOCK = "hhqqi0q"  # Linux's struct flock on 64 bits: type, whence, start, length, pid
NFS_S = 10.0  # in which a file that one machine has written is seen by the others, if the folder is theirs too


class FolderLock:
    """Held while it is entered. `warn` hears of a file system that has no locks; the run then goes on without.
    `option`: what chooses the folder."""

    def __init__(self, folder: Path, warn: Callable[[str], None], option: str = "--run.dir") -> None:
        self.path, self.warn, self.option = folder / NAME, warn, option
        self.token = secrets.token_hex(8)  # by which other machines know that they see the same folder
        self._file: TextIO | None = None

    def __enter__(self) -> FolderLock:
        """Raises: ConfigError where another process holds it; OSError where the folder cannot be written."""
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            self._take(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def _take(self, file: TextIO) -> None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"{self.path.parent}: another run works there: {_describe(read(self.path))}. Wait for it, stop it, or "
                f"choose another {self.option}"
            ) from None
        except OSError as error:
            self.warn(f"{self.path} cannot be locked ({error.strerror}): nothing keeps a second run off this folder")
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": self.token}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """What the last holder wrote; nothing where there is none or it is being written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_held(folder: Path) -> bool:
    """Whether another process works in the folder, on this machine or another. It is asked, not tried: a run that
    starts at this moment finds its folder free. False where the file system cannot say.

    Only for processes that do not hold the lock themselves, which would lose it.
    """
    question = struct.pack(FLOCK, fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with (folder / NAME).open("rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK


def is_seen(folder: Path, token: str, seconds: float = NFS_S) -> bool:
    """Whether the folder here is the one where the lock with this token is. Costs: `seconds` where it is not."""
    deadline = time.monotonic() + seconds
    while read(folder / NAME).get("token") != token:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
