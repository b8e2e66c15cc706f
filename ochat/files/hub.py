"""What a message says where a base model's folder was asked for and a hub's name, or nothing, was given."""

from __future__ import annotations

from pathlib import Path


def how_to_fetch(base: str | Path) -> str:
    """One sentence: how to get a local folder that can be used."""
    name = str(base)
    name = name if name.count("/") == 1 and not name.startswith((".", "/")) else "ORG/NAME"
    return (
        "A base model is a local folder with config.json, safetensors and a tokenizer; fetch a hub model first, with "
        f"`hf download {name} --local-dir DIR`, and name DIR"
    )
