"""A tokenizer.json as training uses it and as a server needs it: what is taken out of one, and what an export puts in.

json = read_json(find_tokenizer(Path("models/base")), added_tokens=("<|end_of_turn|>",)); json.spec
for_server(json.spec, boundary=True)
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import tokenizers

from ochat.text.tokenizer_convert import ReadTokenizer
from ochat.text.tokenizer_files import TokenizerFiles

# what an exported tokenizer splits at and drops: two Unicode noncharacters, which no text holds
BOUNDARY = "\ufdd0\ufdd1"
_BOUNDARY_SPLIT = {"type": "Split", "pattern": {"String": BOUNDARY}, "behavior": "Removed", "invert": False}


def read_json(files: TokenizerFiles, added_tokens: Collection[str]) -> ReadTokenizer:
    """A tokenizer.json without truncation, padding and export's boundary, its special tokens found by their bare text.

    `added_tokens` that it has are special. BOS is the one that its post-processor sets where no file names one.
    """
    spec = _without_boundary(files.tokenizer_json) | {"truncation": None, "padding": None}
    bare = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    spec["added_tokens"] = [
        entry | bare if entry.get("special") or entry["content"] in added_tokens else entry
        for entry in spec.get("added_tokens") or []
    ]
    names = files.names
    if not names and not (files.path.parent / "tokenizer_config.json").exists():
        first = ((spec.get("post_processor") or {}).get("single") or [{}])[0]
        names = {"bos": first["SpecialToken"]["id"]} if "SpecialToken" in first else {}
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return ReadTokenizer(model, files.tokens, names.get("bos"), names.get("eos"))


def for_server(spec: dict[str, Any], *, boundary: bool) -> dict[str, Any]:
    """The tokenizer.json for a server, which tokenises a whole chat where training tokenises each segment alone.

    A dummy prefix comes at every section. `boundary`: the text is first split at BOUNDARY, which is dropped.
    """
    pre = spec["pre_tokenizer"] and _at_every_section(spec["pre_tokenizer"])
    if boundary:
        pre = {"type": "Sequence", "pretokenizers": [_BOUNDARY_SPLIT, *([pre] if pre else [])]}
    return spec | {"pre_tokenizer": pre}


def _at_every_section(step: dict[str, Any]) -> dict[str, Any]:
    if "pretokenizers" in step:
        return step | {"pretokenizers": [_at_every_section(each) for each in step["pretokenizers"]]}
    return step | {"prepend_scheme": "always"} if step.get("prepend_scheme") == "first" else step


def _without_boundary(spec: dict[str, Any]) -> dict[str, Any]:
    pre = spec.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) else None
    if not steps or steps[0].get("pattern") != _BOUNDARY_SPLIT["pattern"]:
        return spec
    return spec | {"pre_tokenizer": steps[1] if len(steps) > 1 else None}
