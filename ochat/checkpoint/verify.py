"""Verify a checkpoint: manifest, sizes, and the sha256 of every file, each read by one of the ranks.

    manifest = verify_checkpoint(Path("runs/a/checkpoints/step_20"), ranks)
Data sets and bases are verified by the same `verify_files` (train/verify.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ochat.checkpoint.manifest import Manifest, damaged
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, OchatError, message
from ochat.files import checksums

log = logging.getLogger(__name__)
QUIET_BYTES = 2e9  # reading more is announced: it takes seconds


def verify_checkpoint(folder: Path, ranks: Ranks) -> Manifest:
    """The manifest of a folder whose files all have their sizes and checksums. Every rank calls it.

    Raises: CheckpointError naming the file, the same on all ranks. Costs: every file is read once by one of the ranks,
    about 1 s a GB.
    """
    found: list[Manifest] = []

    def list_files() -> dict[Path, str]:
        found.append(Manifest.read(folder))
        found[0].check_sizes()
        return found[0].checksums()

    verify_files(list_files, damaged, CheckpointError, ranks, f"{folder} with its checksums")
    return found[0]


def verify_weights(manifest: Manifest) -> None:
    """Raises: CheckpointError naming a damaged file; the optimizer's are not read. Costs: reads the others once."""
    files = {path: sha for path, sha in manifest.checksums().items() if not path.name.startswith("optimizer-")}
    if path := checksums.first_changed(files):
        raise CheckpointError(damaged(path))


def verify_files(
    list_files: Callable[[], dict[Path, str]],
    damaged: Callable[[Path], str],
    error: type[OchatError],
    ranks: Ranks,
    what: str,
) -> int:
    """Compares files with their sha256 and returns their number. Every rank calls it and reads its share of them.

    `damaged`: the message about a file; `what`: what is read, for a note where it is large. Raises: `error` on all
    ranks with the first rank's problem.
    """
    problem, files = "", {}
    try:
        files = list_files()
        largest_first = sorted(files, key=lambda path: (-path.stat().st_size, path))
        if (num_bytes := sum(path.stat().st_size for path in files)) > QUIET_BYTES:
            log.info("comparing %.1f GB of %s", num_bytes / 1e9, what)
        changed = checksums.first_changed({path: files[path] for path in largest_first[ranks.rank :: ranks.world]})
        problem = damaged(changed) if changed else ""
    except (OchatError, OSError) as caught:
        problem = message(caught)
    ranks.raise_on_all_ranks(problem, error)
    return len(files)
