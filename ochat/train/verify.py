"""Compare the files that a run reads, data sets and base, with their checksums.

    verify.data([config.data.path], ranks);  verify.base(Path("bases/llama"), ranks)
Each file is read by one rank, and all ranks learn the result. If every machine has its own copy, each machine checks
only its ranks' share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ochat.checkpoint.manifest import verify_files
from ochat.data import manifest
from ochat.data.dataset import Paths, folder_list
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, DataError
from ochat.files import checksums

log = logging.getLogger(__name__)


def data(paths: Sequence[Paths], ranks: Ranks) -> None:
    """Compare all files of these data sets (an empty path is none). All ranks call it.

    Raises: DataError naming the file, on all ranks. Costs: about 1 s a GB, shared by the ranks.
    """

    folders = [folder for path in paths if path for folder in folder_list(path)]

    def expected() -> dict[Path, str]:
        return {file: sha256 for folder in folders for file, sha256 in manifest.listed_checksums(folder).items()}

    what = "data with its checksums; --data.verify=false skips this"
    verify_files(expected, manifest.changed, DataError, ranks, what)


def base(folder: Path, ranks: Ranks) -> None:
    """Compare the base's files, if its folder has checksums. All ranks call it.

    Raises: CheckpointError naming the file, on all ranks. Costs: about 1 s a GB, shared by the ranks.
    """
    what = f"{folder} with its checksums"
    if not verify_files(lambda: checksums.expected(folder), checksums.damaged, CheckpointError, ranks, what):
        log.info(f"{folder}: no checksums, so only headers and finite values are checked; {checksums.HOW_TO_MAKE}")
