"""Several prepared data sets as one, without copying them: a manifest alone that names the shards where they lie.

    merge(["data/1", "data/2"], "data/all"); TokenDataset("data/all")      # `ochat prepare --merge`

Examples come in the order of the sets. Paths are relative where a set lies below or beside the output, so that the tree
can be moved as a whole, and absolute elsewhere. Moving or deleting a set breaks what was merged from it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ochat.data import shards
from ochat.errors import ConfigError, DataError

# what decides which ids a conversation becomes, and which conversations may be trained on
SAME = ("template", "conditions", "context", "tokenizer", "roles", "held_out")
HINTS = {
    "tokenizer": "they were prepared with different bases",
    "template": "they were prepared with different templates or contexts",
    "held_out": "one of them is held out for evaluation, or with another --held-out",
}


class Source(NamedTuple):
    """One of the sets to merge."""

    folder: Path
    manifest: dict[str, Any]


def merge(folders: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write OUTPUT/manifest.json, and return it.

    Raises ConfigError for sets that do not belong together (naming what differs), for one given twice and for an output
    in the way; DataError for a folder that is no data set or lacks a file, and for an incomplete set of `--shard`s.
    """
    sources = [Source(Path(os.path.abspath(folder)), shards.read_manifest(Path(folder))) for folder in folders]
    target = Path(os.path.abspath(output))
    _check(sources, target, overwrite)
    first = sources[0].manifest
    merged: dict[str, Any] = {"format": shards.FORMAT, "version": shards.MERGED_VERSION}
    merged |= {key: first[key] for key in SAME if key in first}
    merged |= {"counts": _sum([source.manifest.get("counts", {}) for source in sources])}
    merged |= {"classes": _union(sources, "classes"), "files": _union(sources, "files"), **_parts(sources, target)}
    target.mkdir(parents=True, exist_ok=True)
    shards.write_manifest(target / shards.MANIFEST, merged)
    return merged


def _parts(sources: list[Source], target: Path) -> dict[str, Any]:
    """The `parts` and `shards` of the merged manifest. A set that is merged itself brings its own parts."""
    parts: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    for folder, manifest in sources:
        numbers: dict[int, int] = {}
        for shard in manifest["shards"]:
            old = shard.get("part", -1)
            if old not in numbers:
                numbers[old] = len(parts)
                classes, files = shards.names(manifest, shard)
                parts.append({"classes": classes, "files": files})
            path = _reference(shards.check_size(folder, shard), target)
            described.append(shard | {"file": path, "part": numbers[old]})
    return {"parts": parts, "shards": described}


def _reference(path: Path, target: Path) -> str:
    """How the manifest in `target` names a file."""
    path = Path(os.path.abspath(path))
    is_near = path.is_relative_to(target.parent)
    return Path(os.path.relpath(path, target)).as_posix() if is_near else str(path)


def _check(sources: list[Source], target: Path, overwrite: bool) -> None:
    if not sources:
        raise ConfigError("no data set to merge: give their folders with --merge")
    for folder, count in Counter(source.folder for source in sources).items():
        if count > 1:
            raise ConfigError(f"{folder}: given {count} times to merge; every set is taken once")
    for source in sources:
        _check_same(sources[0], source)
    _check_complete(sources)
    if target in (source.folder for source in sources):
        raise ConfigError(f"{target}: is one of the sets to merge: give another --output")
    path = target / shards.MANIFEST
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file: give another --output")
    if path.exists() and shards.read_manifest(target)["version"] != shards.MERGED_VERSION:
        raise ConfigError(f"{target}: a data set with shards of its own is there: give another --output")
    if path.exists() and not overwrite:
        raise ConfigError(f"{target}: a merged data set is there: give another --output, or --overwrite to replace it")


def _check_same(first: Source, other: Source) -> None:
    for key in SAME:
        ours, theirs = first.manifest.get(key), other.manifest.get(key)
        if ours != theirs:
            hint = HINTS.get(key, "prepare them alike")
            raise ConfigError(
                f"{other.folder} and {first.folder} cannot be merged: {key} differs ({_shown(ours, theirs)}); {hint}"
            )


def _shown(ours: Any, theirs: Any) -> str:
    """What differs, of tables the first such entry only."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        return f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
    return f"{theirs!r}, not {ours!r}"


def _check_complete(sources: list[Source]) -> None:
    """Every shard of an input once: what one process forgot would be missing without a word."""
    groups: dict[tuple[int, str], dict[int, Path]] = {}
    for folder, manifest in sources:
        if (shard := manifest.get("shard")) is None:
            continue
        group = groups.setdefault((shard["of"], ", ".join(shard["input"])), {})
        if (other := group.setdefault(shard["number"], folder)) != folder:
            what = f"both are shard {shard['number']}/{shard['of']} of {', '.join(shard['input'])}"
            raise DataError(
                f"{folder} and {other}: {what}: merge one of them, or, of different inputs, each input first"
            )
    for (of, inputs), group in groups.items():
        if missing := [f"{number}/{of}" for number in range(1, of + 1) if number not in group]:
            raise DataError(f"shard {', '.join(missing)} of {inputs} is missing: prepare it, and merge all {of}")


def _union(sources: list[Source], key: str) -> list[str]:
    return list(dict.fromkeys(name for source in sources for name in source.manifest[key]))


def _sum(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of all sets, by class too."""
    total: dict[str, Any] = {}
    for one in counts:
        for key, value in one.items():
            if isinstance(value, dict):
                total[key] = _sum([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total
