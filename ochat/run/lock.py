"""Allow one run at a time on a run folder: a lock on RUN/.lock, which the system frees when its process ends.

    with FolderLock(folder) as lock: ...       cat runs/a/.lock  says which process works there, and since when

A POSIX record lock: NFS shares it between machines, and forked processes do not inherit it. It is lost as soon as the
process closes any descriptor of that file, so nothing else in the process opens it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ochat.errors import ConfigError
from ochat.run import layout

log = logging.getLogger(__name__)
FLOCK = "hhqqi0q"  # Linux's struct flock on 64 bits: type, whence, start, length, pid
NFS_S = 10.0  # in which a file that one machine has written is seen by the others, if the folder is theirs too


class FolderLock:
    """Held while it is entered; on a file system without locks the run continues unlocked, with a warning.

    `option`: the option that chooses the folder, for the message about a folder in use.
    """

    def __init__(self, folder: Path, option: str = "--run.dir") -> None:
        self.path, self.option = folder / layout.LOCK, option
        self.token = secrets.token_hex(8)  # by which other machines recognise the same folder
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
                f"{self.path.parent}: another run works there: {_describe(read_holder(self.path))}. "
                f"Wait for it, stop it, or choose another {self.option}"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): a second run could start there", self.path, error.strerror)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": self.token}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_holder(path: Path) -> dict[str, Any]:
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
        with (folder / layout.LOCK).open("rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return False
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK


def is_seen(folder: Path, token: str, seconds: float = NFS_S) -> bool:
    """Whether the folder here is the one where the lock with this token is. Costs: `seconds` where it is not."""
    deadline = time.monotonic() + seconds
    while read_holder(folder / layout.LOCK).get("token") != token:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', '?')}"
