"""Refuse a tokenizer.json that would multiply text, before it is used: such a file takes all of a machine's memory.

    check_steps(json.loads(text), "models/base/tokenizer.json")

The rule is what its steps could do to some text, not what they do to a sample: a chain of replacements multiplies.
What real tokenizers write stays far below: " " as "▁" is 3 bytes for 1, and NFKC a handful for the letters of a text.
"""

from __future__ import annotations

import base64
import binascii
import math
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError

MOST_GROWTH = 16  # of a text, in bytes
LONGEST_PREPENDED = 64
COMPATIBLE = ("NFKC", "NFKD", "Precompiled")  # decompose letters
DECOMPOSED, LONGEST_DECOMPOSED = 4, 64  # bytes for one, in a text; of the longest letter, U+FDFA, 33 bytes
PARTS = ("normalizer", "pre_tokenizer", "decoder")
CHAINS = ("normalizers", "pretokenizers", "decoders")  # keys of a Sequence


def check_steps(spec: dict[str, Any], path: Path) -> None:
    """Raises: ConfigError for an empty pattern, and for steps that can make text longer than MOST_GROWTH times."""
    for part in PARTS:
        growth = _growth(spec.get(part), f"{path}: its {part}")
        if growth > MOST_GROWTH:
            raise ConfigError(f"{path}: its {part} makes text up to {growth:.0e} times longer; fetch it again")


def _growth(step: Any, place: str) -> float:
    """How many times longer a step can make a text. Raises: ConfigError for an empty pattern."""
    if not isinstance(step, dict):
        return 1.0
    for key in CHAINS:
        if isinstance(step.get(key), list):
            return math.prod(_growth(each, place) for each in step[key])
    pattern = step.get("pattern")
    replaced = next(iter(pattern.values()), None) if isinstance(pattern, dict) else pattern
    if replaced == "":
        raise ConfigError(f"{place} has an empty pattern, which is everywhere; fetch it again")
    written, kind = len(str(step.get("content") or "").encode()), step.get("type")
    if kind == "Prepend" and len(str(step.get("prepend"))) > LONGEST_PREPENDED:
        return math.inf
    if kind == "Precompiled" and _longest(step.get("precompiled_charsmap")) > LONGEST_DECOMPOSED:
        return math.inf
    if kind in COMPATIBLE:
        return DECOMPOSED
    if kind != "Replace" or not written:
        return 1.0
    if isinstance(pattern, dict) and "Regex" in pattern:  # which may match nothing, between any two letters
        return max(2.0, written)
    return max(written / len(str(replaced).encode()), 1.0)


def _longest(charsmap: Any) -> int:
    """Bytes of the longest text that a SentencePiece map of characters writes: a trie's size, the trie, the texts."""
    try:
        data = base64.b64decode(charsmap or "")
    except (binascii.Error, TypeError, ValueError):
        return 0  # the library refuses it
    return max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0)
