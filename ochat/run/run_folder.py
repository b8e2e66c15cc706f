"""Make, check and lock a run's folder, before the model is loaded. layout.py names what is in it."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ochat.config import RunConfig
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.run import layout, lock
from ochat.run.lock import FolderLock

PROBE_BYTES = 1 << 16


@contextmanager
def acquire_run_dir(run: RunConfig, ranks: Ranks) -> Iterator[Path]:
    """The run folder as the first rank's working directory resolves it, made where it is missing, and locked.

    Raises: ConfigError where it cannot be written, another process works in it, it holds another run, or a rank sees
    another folder there; on the other ranks a silent SystemExit, so that only one prints the message.
    """
    with ExitStack() as held:
        mine = _acquire(run, held) if ranks.is_first else {}
        first = ranks.all_gather_json(mine)[0]
        _end_all(ranks, first.get("problem", ""))
        folder = Path(first["folder"])
        seen = lock.is_seen(folder, first["token"]) if not ranks.is_first else True
        found = ranks.all_gather_json({"seen": seen, "host": socket.gethostname()})
        _end_all(ranks, next((_unseen(folder, r["host"], found[0]["host"]) for r in found if not r["seen"]), ""))
        yield folder


def _acquire(run: RunConfig, held: ExitStack) -> dict[str, str]:
    """Make, lock and probe the folder; returns the message to the other ranks."""
    try:
        folder = Path(run.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        token = held.enter_context(FolderLock(folder)).token
        _try_to_write(folder / ".probe")
        _refuse_overwriting(folder, run)
    except ConfigError as error:
        return {"problem": f"run.dir = {run.dir!r}: {error}"}
    except FileExistsError:
        return {"problem": f"run.dir = {run.dir!r} is a file; name a folder"}
    except (OSError, ValueError) as error:  # ValueError: no path has a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        return {"problem": f"run.dir = {run.dir!r} cannot be written ({why}); name a folder that can"}
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


def _unseen(folder: Path, host: str, first_host: str) -> str:
    return (
        f"run.dir = {str(folder)!r} on {host} is not the folder that it is on {first_host}: all processes need one "
        "folder, on a disk that their machines share"
    )


def _refuse_overwriting(folder: Path, run: RunConfig) -> None:
    if run.resume == "never" and layout.checkpoint_folders(folder):
        raise ConfigError(
            "holds checkpoints of another run and run.resume is 'never'; "
            "choose another --run.dir, or remove that folder"
        )
