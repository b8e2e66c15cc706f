"""Checksums of files: compute, compare, and find the expected sha256 of a model folder's files in one of three places.

    for path, expected in checksums.expected(Path("models/llama")).items(): assert checksums.sha256(path) == expected

1. SHA256SUMS, as `sha256sum *.safetensors > SHA256SUMS` makes it; `ochat init-base` and `ochat export` write one.
2. In the hub's cache a file is a link to a blob that has the sum for its name.
3. `hf download --local-dir` leaves the sum of a large file in .cache/huggingface/download/NAME.metadata, second line.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ochat.errors import CheckpointError
from ochat.files import atomic

SUMS = "SHA256SUMS"
HOW_TO_MEND = f"fetch it again, or, if it was changed on purpose, renew {SUMS}: sha256sum *.safetensors > {SUMS}"
HOW_TO_MAKE = f"`sha256sum *.safetensors > {SUMS}` in a folder known to be good makes them"
THREADS = 4  # that hash files: one is slower than the disks on which large models are kept
MAX_SUMS_BYTES = 1 << 24  # a hundred thousand files
_LINE = re.compile(r"\\?([0-9a-fA-F]{64}) [ *](.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def sha256(path: Path) -> str:
    """Hex digest of a file's content. Raises: OSError. Costs: reads the file, about 1 s a GB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_changed(files: Mapping[Path, str]) -> Path | None:
    """The first file whose sha256 is not the given one. Raises: OSError. Costs: reads the files, THREADS at a time,
    each about 1 s a GB."""
    with ThreadPoolExecutor(THREADS) as pool:
        sums = zip(files.items(), pool.map(sha256, files), strict=True)
        changed = next((path for (path, right), found in sums if found != right), None)
        pool.shutdown(cancel_futures=True)
    return changed


def expected(folder: Path) -> dict[Path, str]:
    """File -> sha256 of what SHA256SUMS lists; without one, of the safetensors of which the hub's files tell.

    Raises: CheckpointError for a SHA256SUMS that is none, names files elsewhere or a file that is missing. Costs: reads
    no weights.
    """
    if (folder / SUMS).is_file():
        return _listed(folder)
    known = {path: _by_hub(path) for path in sorted(folder.glob("*.safetensors"))}
    return {path: found for path, found in known.items() if found}


def compare(files: dict[Path, str]) -> None:
    """Raises: CheckpointError naming the first file that is another one. Costs: reads them, about 1 s a GB."""
    if path := first_changed(files):
        raise CheckpointError(damaged(path))


def damaged(path: Path) -> str:
    """The message about a file of another content."""
    return f"{path}: damaged (its checksum differs); {HOW_TO_MEND}"


def write(folder: Path) -> None:
    """Writes SHA256SUMS of all files in a finished folder. Costs: reads them, about 1 s a GB."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    atomic.write_text(folder / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in files))


def _listed(folder: Path) -> dict[Path, str]:
    path = folder / SUMS
    with path.open("rb") as file:
        lines = file.read(MAX_SUMS_BYTES).decode("utf-8", "replace").splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        name = match[2].removeprefix("./") if match else ""
        if match is None or not atomic.is_file_name(name):
            raise CheckpointError(
                f"{path}, line {number}: expected a sha256 and the name of a file next to it, as sha256sum writes them"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing, but {SUMS} lists it; fetch it again, or remove its line")
        found[folder / name] = match[1].lower()
    if not found:
        raise CheckpointError(f"{path}: lists no file; make it with sha256sum *.safetensors, or remove it")
    return found


def _by_hub(path: Path) -> str:
    """The sum that the hub's files tell, "" if none do."""
    target = Path(os.readlink(path)).name if path.is_symlink() else ""
    if _SHA256.fullmatch(target):
        return target
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if not record.is_file():
        return ""
    with record.open("rb") as file:
        lines = file.read(1000).decode("utf-8", "replace").splitlines()
    etag = lines[1].strip() if len(lines) > 1 else ""
    return etag if _SHA256.fullmatch(etag) else ""
