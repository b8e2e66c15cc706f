"""Whether a data set is still what was written: sizes and checksums of all its files (`ochat prepare --check DIR`).

    print(check("data/train").summary())

Opening a data set compares sizes alone; this reads every byte, of the shards that a merged set refers to as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ochat import disk
from ochat.data import shards
from ochat.errors import DataError


class Checked(NamedTuple):
    """What was found to be whole."""

    folder: Path
    num_files: int
    num_bytes: int

    def summary(self) -> str:
        """One line."""
        return f"{self.folder}: {self.num_files} files, {self.num_bytes / 1e6:.1f} MB, all as they were written"


def check(folder: str | Path) -> Checked:
    """Read everything and compare. Raises DataError naming the first file that is missing or has changed."""
    folder = Path(folder)
    manifest = shards.read_manifest(folder)
    path = folder / shards.MANIFEST
    if "digest" not in manifest:
        raise DataError(f"{path}: has no digest, an older ochat wrote it: prepare the data again to have it checked")
    if shards.digest(manifest) != manifest["digest"]:
        raise DataError(f"{path}: its content has changed since it was written: copy it again, or prepare again")
    described = [*manifest["shards"], *manifest.get("others", [])]
    for one in described:
        path = shards.check_size(folder, one)
        if disk.sha256(path) != one["sha256"]:
            raise DataError(f"{path}: its content has changed since it was written: copy it again, or prepare again")
    return Checked(folder, len(described) + 1, sum(one["bytes"] for one in described))
