"""What a data set's manifest must hold for everything that reads it: kinds, bounds, and files that stay in the folder.

    manifest_schema.check(manifest, folder / "manifest.json")

A manifest is a file like others: it may be damaged, of another program, or written to lead elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ochat.errors import DataError
from ochat.files import atomic

KINDS: dict[str, type] = {
    "template": dict,
    "tokenizer": dict,
    "context": int,
    "classes": list,
    "roles": list,
    "files": list,
    "shards": list,
}
MOST = 1 << 53  # of any count: what every reader of JSON keeps exact
MOST_NAMES = 1 << 16  # of classes and of files: shards number them in 16 bits
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check(manifest: Mapping[str, Any], path: Path) -> None:
    """Raises: DataError naming the manifest and its key."""
    for key, kind in KINDS.items():
        _expect(path, key, _is(manifest.get(key), kind), f"{kind.__name__} expected")
    _expect(path, "tokenizer", _is(manifest["tokenizer"].get("fingerprint"), str), "a fingerprint expected")
    _expect(path, "roles", _are_texts(manifest["roles"]), "a list of texts expected")
    counts = manifest.get("counts", {})
    _expect(path, "counts", _is(counts, dict) and _are_counts(counts), "counts, and tables of them, expected")
    shard = manifest.get("shard", {"number": 1, "of": 1, "input": []})
    is_shard = _is(shard, dict) and _are_counts([shard.get("number"), shard.get("of")])
    _expect(path, "shard", is_shard and _are_texts(shard.get("input")), "number, of and input expected")
    _check_names(path, "", manifest, is_merged="parts" in manifest)
    parts = manifest.get("parts", [])
    _expect(path, "parts", _is(parts, list) and all(_is(part, dict) for part in parts), "a list of tables expected")
    for i, part in enumerate(parts):
        _check_names(path, f"parts[{i}].", part)
    others = manifest.get("others", [])
    _expect(path, "others", _is(others, list), "a list expected")
    for key, described in (("shards", manifest["shards"]), ("others", others)):
        for i, one in enumerate(described):
            _check_file(path, f"{key}[{i}]", one, len(parts))


def _check_names(path: Path, place: str, owner: Mapping[str, Any], is_merged: bool = False) -> None:
    for key in ("classes", "files"):
        names = owner.get(key)
        _expect(path, place + key, _are_texts(names), "a list of texts expected")
        assert names is not None
        most = MOST if is_merged else MOST_NAMES  # a merged set numbers them part by part
        is_fine = len(names) <= most and (key == "files" or len(set(names)) == len(names))
        _expect(path, place + key, is_fine, f"{len(names)} names, at most {MOST_NAMES}, each once, expected")


def _check_file(path: Path, place: str, one: Any, num_parts: int) -> None:
    """A file beside the manifest; only a merged set, whose shards have parts, may name others by their paths."""
    _expect(path, place, _is(one, dict), "a table expected")
    name, part = one.get("file"), one.get("part")
    is_path = _is(name, str) and len(name) < 4096 and atomic.is_file_name(PurePosixPath(name).name)
    _expect(path, f"{place}.file", is_path, "the name of a file expected")
    _expect(path, f"{place}.sha256", bool(_SHA256.fullmatch(str(one.get("sha256")))), "64 hexadecimal digits expected")
    sizes = {"bytes": one.get("bytes")} | {key: one[key] for key in ("sequences", "tokens") if key in one}
    _expect(path, place, _are_counts(sizes), f"counts expected as {', '.join(sizes)}")
    if num_parts:
        _expect(path, f"{place}.part", _is(part, int) and 0 <= part < num_parts, f"one of {num_parts} parts expected")
    else:
        is_beside = part is None and atomic.is_file_name(name)
        _expect(path, f"{place}.file", is_beside, "the name of a file in this folder expected")


def _are_texts(value: Any) -> bool:
    return _is(value, list) and all(_is(text, str) for text in value)


def _are_counts(value: Any) -> bool:
    """Whole numbers, or tables or lists of them."""
    if isinstance(value, dict | list):
        return all(map(_are_counts, value.values() if isinstance(value, dict) else value))
    return _is(value, int) and 0 <= value <= MOST


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _expect(path: Path, key: str, condition: bool, expected: str) -> None:
    if not condition:
        raise DataError(f"{path}: damaged ({key}: {expected}): copy it again, or prepare the data again")
