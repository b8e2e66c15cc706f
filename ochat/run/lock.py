"""Take a run's folder before the model is loaded: make, lock and check it; layout.py names what is in it.

    with acquire_run_dir(config.run, ranks) as folder: ...
    with folder_lock(folder): ...                cat runs/a/.lock  says which process works there, and since when

The lock is a POSIX record lock on RUN/.lock, which the system frees when its process ends: NFS shares it between
machines, and forked processes do not inherit it. It is lost as soon as the process closes any descriptor of that file,
so nothing else in the process opens it.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ochat.config import RunConfig
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.run import layout

if TYPE_CHECKING:  # torch takes seconds to import; `ochat report` should not
    from ochat.distributed.processes import Ranks

log = logging.getLogger(__name__)
FLOCK = "hhqqi0q"  # Linux's struct flock on 64 bits: type, whence, start, length, pid
NFS_S = 10.0  # in which a file that one machine has written is seen by the others, if the folder is theirs too
PROBE_BYTES = 1 << 16


@contextmanager
def acquire_run_dir(run: RunConfig, ranks: Ranks) -> Iterator[Path]:
    """The run folder as the first rank's working directory resolves it, made where it is missing, and locked.

    Raises: ConfigError where it cannot be written, another process works in it, it holds another run, or a rank sees
    another folder there; on the other ranks a silent SystemExit, so that only one prints the message.
    """
    with ExitStack() as held:
        first = ranks.all_gather_json(_acquire(run, held) if ranks.is_first else {})[0]
        _end_all(ranks, first.get("problem", ""))
        folder = Path(first["folder"])
        seen = ranks.is_first or is_seen(folder, first["token"])
        found = ranks.all_gather_json({"seen": seen, "host": socket.gethostname()})
        for host in [each["host"] for each in found if not each["seen"]]:
            _end_all(
                ranks,
                f"run.dir = {str(folder)!r} on {host} is not the folder that it is on {found[0]['host']}: all "
                "processes need one folder, on a disk that their machines share",
            )
        yield folder


@contextmanager
def folder_lock(folder: Path, option: str = "--run.dir") -> Iterator[str]:
    """Hold the folder's lock; yields a token by which other machines recognise the same folder. On a file system
    without locks the run continues unlocked, with a warning.

    `option`: the option that chooses the folder, for the message about a folder in use. Raises: ConfigError where
    another process holds it; OSError where the folder cannot be written.
    """
    path, token = folder / layout.LOCK, secrets.token_hex(8)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pid, host, since = (read_holder(path).get(key, "?") for key in ("pid", "host", "since"))
            raise ConfigError(
                f"{folder}: another run works there: process {pid} on {host}, since {since}. Wait for it, stop it, or "
                f"choose another {option}"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): a second run could start there", path, error.strerror)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}
        file.write(json.dumps(holder) + "\n")
        file.flush()
        os.fsync(file.fileno())
        yield token


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


def _acquire(run: RunConfig, held: ExitStack) -> dict[str, str]:
    """Make, lock and probe the folder; returns the message to the other ranks."""
    try:
        folder = Path(run.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        token = held.enter_context(folder_lock(folder))
        _try_to_write(folder / ".probe")
    except ConfigError as error:
        return {"problem": f"run.dir = {run.dir!r}: {error}"}
    except FileExistsError:
        return {"problem": f"run.dir = {run.dir!r} is a file; name a folder"}
    except (OSError, ValueError) as error:  # ValueError: no path has a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        return {"problem": f"run.dir = {run.dir!r} cannot be written ({why}); name a folder that can"}
    if run.resume == "never" and layout.checkpoint_folders(folder):
        return {
            "problem": f"run.dir = {run.dir!r}: holds checkpoints of another run and run.resume is 'never'; choose "
            "another --run.dir, or remove that folder"
        }
    return {"folder": str(folder), "token": token}


def _try_to_write(probe: Path) -> None:
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        atomic.fsync(probe)  # a quota may be checked only now
    finally:
        probe.unlink(missing_ok=True)


def _end_all(ranks: Ranks, problem: str) -> None:
    """End all ranks if there is a problem; the first one prints it."""
    if problem and ranks.is_first:
        raise ConfigError(problem)
    if problem:
        time.sleep(1)  # so that it prints before a launcher sees this process end and kills all
        raise SystemExit(ConfigError.exit_code)
