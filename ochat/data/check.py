"""Whether a data set is still what was written: sizes and checksums of all its files (`ochat prepare --check DIR`).

    print(check("data/train").summary())

Opening a data set compares sizes alone; this reads every byte, of the shards that a merged set refers to as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ochat.data import shards
from ochat.errors import DataError
from ochat.files import checksums


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
    files = expected(folder)
    if path := checksums.first_changed(files):
        raise DataError(changed(path))
    return Checked(Path(folder), len(files) + 1, sum(path.stat().st_size for path in files))


def expected(folder: str | Path) -> dict[Path, str]:
    """File -> sha256 of all files of a data set but its manifest, whose own digest is compared, as are all sizes.

    Raises DataError naming the first file that is missing or has another size. Reads no shard.
    """
    manifest = shards.read_manifest(Path(folder))
    described = [*manifest["shards"], *manifest.get("others", [])]
    return {shards.check_size(Path(folder), one): one["sha256"] for one in described}


def changed(path: Path) -> str:
    """The message about a file of another content."""
    return f"{path}: its content has changed since it was written: copy it again, or prepare again"
