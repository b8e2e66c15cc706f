"""A JSON object in a file that nobody vouches for: read within bounds, or refused in one line.

record = bounded_json.read_object(Path("base/config.json"), ConfigError, "fetch it again")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ochat.errors import OchatError

MAX_BYTES = 1 << 27  # the largest in use, tokenizers and manifests of thousands of files, have a third of it
MAX_DEPTH = 64  # below what Python's own reading, writing and printing of nested values can take


def read_object(path: Path, error: type[OchatError], advice: str) -> dict[str, Any]:
    """The object. Raises: FileNotFoundError; `error`, with what to do about it, for a file that is too large, no UTF-8,
    no JSON, nested too deep, or whose texts are no Unicode. Costs: at most some 25 bytes for each of the file's.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise error(f"{path}: more than {MAX_BYTES >> 20} MiB; no such file of JSON is in use; {advice}")
    try:
        record = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # half of a surrogate pair: it can be neither printed nor written
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: damaged, or not valid JSON ({problem}); {advice}") from None
    if not isinstance(record, dict):
        raise error(f"{path}: a JSON object is expected, not {type(record).__name__}; {advice}")
    if _is_deeper(record, MAX_DEPTH):
        raise error(f"{path}: nested more than {MAX_DEPTH} levels deep; {advice}")
    return record


def _is_deeper(record: dict[str, Any], limit: int) -> bool:
    level: list[Any] = [record]
    for _ in range(limit):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for some in children for child in some if isinstance(child, dict | list)]
    return bool(level)
