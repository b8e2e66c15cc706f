"""A run's folder: it is made, checked and described here, before the model is loaded.

RUN/config.toml  config.until_step_N.toml  plan.json  metrics.jsonl  eval.jsonl  samples.jsonl  bad_steps.jsonl
    checkpoints/step_N/  latest  export/  .lock
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import structs

from ochat.config import Config
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.run import layout
from ochat.run import lock as lock_module
from ochat.run.lock import FolderLock

PROBE_BYTES = 1 << 16


@contextmanager
def claim(config: Config, ranks: Ranks, warn: Callable[[str], None]) -> Iterator[Config]:
    """The configuration with run.dir as the first rank's working directory resolves it; the folder is made where it is
    missing, and locked.

    Raises: ConfigError where it cannot be written, another process works in it, it holds another run, or a rank sees
    another folder there; on the other ranks a silent SystemExit, so that one voice says so.
    """
    with ExitStack() as held:
        mine = _take(config, warn, held) if ranks.is_first else {}
        first = ranks.all_gather_json(mine)[0]
        _agree(ranks, first.get("problem", ""))
        folder = Path(first["folder"])
        seen = lock_module.is_seen(folder, first["token"]) if not ranks.is_first else True
        there = ranks.all_gather_json({"seen": seen, "host": socket.gethostname()})
        _agree(ranks, next((_unseen(folder, r["host"], there[0]["host"]) for r in there if not r["seen"]), ""))
        yield structs.replace(config, run=structs.replace(config.run, dir=str(folder)))


def _take(config: Config, warn: Callable[[str], None], held: ExitStack) -> dict[str, str]:
    """Makes, locks and tries the folder; what to tell the other ranks."""
    try:
        folder = Path(config.run.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(FolderLock(folder, warn))
        _try_to_write(folder / ".probe")
        _refuse_overwriting(folder, config)
    except ConfigError as error:
        return {"problem": f"run.dir = {config.run.dir!r}: {error}"}
    except FileExistsError:
        return {"problem": f"run.dir = {config.run.dir!r} is a file; name a folder"}
    except (OSError, ValueError) as error:  # ValueError: no path has a zero byte
        why = error.strerror if isinstance(error, OSError) else error
        return {"problem": f"run.dir = {config.run.dir!r} cannot be written ({why}); name a folder that can"}
    return {"folder": str(folder), "token": lock.token}


def _try_to_write(probe: Path) -> None:
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
        atomic.sync(probe)  # a quota may speak only now
    finally:
        probe.unlink(missing_ok=True)


def _agree(ranks: Ranks, problem: str) -> None:
    """Ends all ranks for what the first one says."""
    if problem and ranks.is_first:
        raise ConfigError(problem)
    if problem:
        time.sleep(1)  # it speaks before a launcher sees this process end, and ends them all
        raise SystemExit(ConfigError.exit_code)


def _unseen(folder: Path, host: str, first_host: str) -> str:
    return (
        f"run.dir = {str(folder)!r} on {host} is not the folder that it is on {first_host}: all processes need one "
        "folder, on a disk that their machines share"
    )


def _refuse_overwriting(folder: Path, config: Config) -> None:
    if config.run.resume == "never" and layout.folders(folder):
        raise ConfigError(
            "holds checkpoints of another run and run.resume is 'never'; "
            "choose another --run.dir, or remove that folder"
        )
