"""Compare the files that a run reads, data sets and base, with their checksums.

    verify.data([config.data.path], ranks);  verify.base(Path("bases/llama"), ranks)
Each file is read by one rank, and all ranks learn the result. If every machine has its own copy, each machine checks
only its ranks' share.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ochat.data import manifest
from ochat.data.dataset import Paths, folder_list
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, DataError, OchatError
from ochat.files import checksums

log = logging.getLogger(__name__)

QUIET_S = 2.0  # a check that takes longer is announced


def data(paths: Sequence[Paths], ranks: Ranks) -> None:
    """Compare all files of these data sets (an empty path is none). All ranks call it.

    Raises: DataError naming the file, on all ranks. Costs: about 1 s a GB, shared by the ranks.
    """

    folders = [folder for path in paths if path for folder in folder_list(path)]

    def expected() -> dict[Path, str]:
        return {file: sha256 for folder in folders for file, sha256 in manifest.listed_checksums(folder).items()}

    note = "comparing {size} of data with its checksums; --data.verify=false skips this"
    _compare(expected, manifest.changed, DataError, ranks, note)


def base(folder: Path, ranks: Ranks) -> None:
    """Compare the base's files, if its folder has checksums. All ranks call it.

    Raises: CheckpointError naming the file, on all ranks. Costs: about 1 s a GB, shared by the ranks.
    """
    note = f"comparing {{size}} of {folder} with its checksums"
    if not _compare(lambda: checksums.expected(folder), checksums.damaged, CheckpointError, ranks, note):
        log.info(f"{folder}: no checksums, so only headers and finite values are checked; {checksums.HOW_TO_MAKE}")


def _compare(
    list_files: Callable[[], dict[Path, str]],
    message: Callable[[Path], str],
    kind: type[OchatError],
    ranks: Ranks,
    note: str,
) -> int:
    """The number of files, of which this rank reads its share; raises `kind` on all ranks if one finds damage."""
    problem, files = "", {}
    try:
        files = list_files()
        mine = sorted(files, key=lambda path: (-path.stat().st_size, path))[ranks.rank :: ranks.world]
        size = f"{sum(path.stat().st_size for path in files) / 1e9:,.1f} GB"
        timer = threading.Timer(QUIET_S, log.info, [note.replace("{size}", size)])
        timer.daemon = True
        timer.start()
        try:
            path = checksums.first_changed({path: files[path] for path in mine})
        finally:
            timer.cancel()
        problem = message(path) if path else ""
    except (OchatError, OSError) as error:
        problem = str(error)
    ranks.raise_on_all_ranks(problem, kind)
    return len(files)
