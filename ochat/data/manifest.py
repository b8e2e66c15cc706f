"""The manifest of a prepared data set: which files it has, how they were made, and whether they are still the same.

    manifest = read_manifest(Path("data/train"))             # a checked dict
    sets = read_together([Path("data/1"), Path("data/2")])   # the shards of one input, as `data.path` lists them
    check_files("data/train")                                # what `ochat prepare --check` runs

A manifest of version 2 (`parts`) names shards in other folders by their paths; an earlier release merged sets that way.
One of version 3 (`token_weights`) has shards with factors, which earlier releases would not see.
The file may be damaged, belong to another program, or be written to harm, so its types and bounds are checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import msgspec

from ochat.errors import ConfigError, DataError
from ochat.files import atomic, bounded_json, checksums
from ochat.text.chat.plain import NUM_PREFIXES
from ochat.text.class_names import check_class_name

FORMAT, VERSION, MERGED_VERSION, WEIGHTED_VERSION = "ochat-tokens", 1, 2, 3
TOKEN_WEIGHTS = "token_weights"  # the key that says which files they came from
MANIFEST = "manifest.json"
MAX_NAMES = 1 << 16  # classes or files of a shard, which numbers them in 16 bits
# what decides which ids a conversation becomes and which conversations may be trained on: equal in sets that are joined
SAME = ("template", "conditions", "condition_from", "context", "tokenizer", "roles", "held_out")
HINTS = {
    "tokenizer": "they were prepared with different bases",
    "template": "they were prepared with different templates or contexts",
    "held_out": "one of them is held out for evaluation, or has another --held-out",
}
AGAIN = "copy it again, or prepare the data again"

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]  # what every JSON reader keeps exact
Names = Annotated[list[str], msgspec.Meta(max_length=MAX_NAMES)]


class _Tokenizer(msgspec.Struct):
    fingerprint: str


class _File(msgspec.Struct):
    file: Annotated[str, msgspec.Meta(max_length=4095)]
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    bytes: Count
    sequences: Count = 0
    tokens: Count = 0
    part: Count | None = None


class _Names(msgspec.Struct):
    classes: Names
    files: Names


class _Prefixes(msgspec.Struct):
    ids: dict[str, list[list[Count]]] = {}
    refused: str = ""


class _ConditionFrom(msgspec.Struct):
    field: str
    edges: list[float] = []
    names: list[str] = []
    step: float = 0.0


class _InputShare(msgspec.Struct):
    number: Count
    of: Count
    input: list[str]


class _Schema(_Names, kw_only=True):
    template: dict[str, Any]
    tokenizer: _Tokenizer
    context: int
    roles: list[str]
    shards: list[_File]
    others: list[_File] = []
    parts: list[_Names] = []
    counts: dict[str, Count | dict[str, Count | dict[str, Count]]] = {}
    shard: _InputShare | None = None
    prefixes: _Prefixes | None = None
    condition_from: _ConditionFrom | None = None


class Prepared(NamedTuple):
    """A folder and its checked manifest."""

    folder: Path
    manifest: dict[str, Any]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished data set. Raises DataError for a folder that holds none, for another version and for
    content that is not what was written, or has a class of a name that is none."""
    path = folder / MANIFEST
    if not path.is_file():
        there = "a file, not a folder" if folder.exists() else "no such folder"
        what = f"no {MANIFEST} in it" if folder.is_dir() else there
        raise DataError(f"{folder.absolute()}: not a prepared data set ({what}): write one with ochat prepare")
    manifest = bounded_json.read_object(path, DataError, AGAIN)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a data set (format is not {FORMAT!r})")
    plain = WEIGHTED_VERSION if TOKEN_WEIGHTS in manifest else VERSION
    if manifest.get("version") != (MERGED_VERSION if "parts" in manifest else plain):
        known = f"{VERSION} to {WEIGHTED_VERSION}"
        raise DataError(
            f"{path}: version {manifest.get('version')!r}, this ochat reads {known}: prepare the data again"
        )
    if manifest.get("digest") != digest(manifest):
        raise DataError(changed(path))
    try:
        _check_content(msgspec.convert(manifest, _Schema), "parts" in manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}): {AGAIN}") from None
    for owner in (manifest, *manifest.get("parts", ())):
        for name in owner["classes"]:
            check_class_name(name, f"{path}: classes")
    return manifest


def read_together(folders: Sequence[Path]) -> list[Prepared]:
    """The sets in order, as parts of one. Raises ConfigError for sets that do not belong together and for one that is
    given twice, DataError as `read_manifest` does and for a `--shard` that is missing."""
    for place, times in Counter(os.path.abspath(folder) for folder in folders).items():
        if times > 1:
            raise ConfigError(f"{place}: listed {times} times; list every data set once")
    sets = [Prepared(folder, read_manifest(folder)) for folder in folders]
    for one in sets[1:]:
        _check_same(sets[0], one)
    if len(sets) > 1:
        _check_complete(sets)
    return sets


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write it with its own digest, and wait until it is on the disk."""
    atomic.write_json(path, manifest | {"digest": digest(manifest)})


def digest(manifest: dict[str, Any]) -> str:
    """sha256 over the manifest without its own `digest`, independent of its layout."""
    kept = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def names(manifest: dict[str, Any], shard: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The classes and the input files that the numbers in one of the manifest's shards mean."""
    owner = manifest if shard.get("part") is None else manifest["parts"][shard["part"]]
    return owner["classes"], owner["files"]


def file_path(folder: Path, described: dict[str, Any]) -> Path:
    """The path of a file of the set. Raises DataError if it is missing or has another size than was written."""
    path = folder / described["file"]
    if not path.is_file():
        raise DataError(f"{path}: missing: copy the whole data set, or prepare the data again")
    if (size := path.stat().st_size) != described["bytes"]:
        raise DataError(f"{path}: {size} bytes instead of {described['bytes']}: {AGAIN}")
    return path


def describe_file(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"file": path.name, "sha256": checksums.sha256(path), "bytes": path.stat().st_size}


def listed_checksums(folder: str | Path) -> dict[Path, str]:
    """File -> sha256 of all files of a data set except its manifest, which holds its own digest.

    Raises DataError naming the first file that is missing or has another size. Reads no shard.
    """
    manifest = read_manifest(Path(folder))
    described = [*manifest["shards"], *manifest.get("others", [])]
    return {file_path(Path(folder), one): one["sha256"] for one in described}


def check_files(folder: str | Path) -> list[Path]:
    """Read every byte of a data set and compare checksums; its files.

    Raises DataError naming the first one that is missing or has changed.
    """
    files = listed_checksums(folder)
    if path := checksums.first_changed(files):
        raise DataError(changed(path))
    return [Path(folder) / MANIFEST, *files]


def changed(path: Path) -> str:
    """The message about a file of another content."""
    return f"{path}: its content has changed since it was written: copy it again, or prepare again"


def _check_content(schema: _Schema, is_merged: bool) -> None:
    """Raises ValueError for what the types alone do not say."""
    for owner in (schema, *schema.parts):
        if len(set(owner.classes)) < len(owner.classes):
            raise ValueError("classes: a name comes twice")
    if schema.prefixes and not schema.prefixes.refused:
        if missing := {"", *schema.classes} - schema.prefixes.ids.keys():
            raise ValueError(f"prefixes: the class {min(missing)!r} has none")
        if any(len(each) != NUM_PREFIXES for each in schema.prefixes.ids.values()):
            raise ValueError(f"prefixes: each class needs {NUM_PREFIXES}")
    parts = range(len(schema.parts)) if is_merged else (None,)
    for one in (*schema.shards, *schema.others):
        if not atomic.is_file_name(PurePosixPath(one.file).name if is_merged else one.file):
            raise ValueError(f"{one.file!r}: the name of a file in this folder expected")  # a path only in a merged set
        if one.part not in parts:
            raise ValueError(f"{one.file}: part is {one.part}, of {len(schema.parts)} parts")


def _check_same(first: Prepared, other: Prepared) -> None:
    for key in SAME:
        ours, theirs = first.manifest.get(key), other.manifest.get(key)
        if key == "roles" and ours and theirs:  # numbers mean the same where one list has more at its end
            ours, theirs = ours[: len(theirs)], theirs[: len(ours)]
        if ours != theirs:
            hint = HINTS.get(key, "prepare them alike")
            raise ConfigError(
                f"{other.folder} and {first.folder} cannot be joined: {key} differs ({_difference(ours, theirs)}); "
                f"{hint}. Sets that were not made alike can only be mixed, with [data.mix]"
            )


def _difference(ours: Any, theirs: Any) -> str:
    """What differs; of tables only the first such entry."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        key = next(key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key))
        return f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
    return f"{theirs!r}, not {ours!r}"


def _check_complete(sets: list[Prepared]) -> None:
    """Every `--shard` of an input once: a forgotten one would be missing from training without notice."""
    groups: dict[tuple[int, str], dict[int, Path]] = {}
    for folder, manifest in sets:
        if (share := manifest.get("shard")) is None:
            continue
        inputs = ", ".join(share["input"])
        group = groups.setdefault((share["of"], inputs), {})
        if (other := group.setdefault(share["number"], folder)) != folder:
            what = f"both are shard {share['number']}/{share['of']} of {inputs}"
            raise DataError(f"{folder} and {other}: {what}: list one of them, or mix the two with [data.mix]")
    for (of, inputs), group in groups.items():
        if missing := [f"{number}/{of}" for number in range(1, of + 1) if number not in group]:
            raise DataError(f"shard {', '.join(missing)} of {inputs} is missing: prepare it, and list all {of}")
