"""Open a safetensors file whose header is bounded and names no tensor twice; without torch.

    file = open_checked(path, "numpy");  file.get_tensor("weights")

The library reads a header of 100 MB, and of two tensors of one name it silently takes the last.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ochat.files.bounded_json import shown

MAX_HEADER_BYTES = 1 << 25  # a model of a hundred thousand tensors has half of it


def open_checked(path: Path, framework: str) -> Any:
    """The library's open file, tensors on the CPU. Raises: OSError; SafetensorError for what is damaged; ValueError for
    a header that is too large, which is not parsed, or that names a tensor twice."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        header = file.read(size)
    opened = safe_open(path, framework=framework, device="cpu")  # offsets tile the file, and shapes fit them
    json.loads(header, object_pairs_hook=_unique)
    return opened


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {shown(name)} twice")
    return found
