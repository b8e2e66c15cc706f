"""Reads the tokens that a folder adds to its tokenizer's vocabulary, and the names of its BOS and EOS.

    tokens = read_added_tokens(Path("models/base"), tokenizer_json)

Tokens come from tokenizer.json, tokenizer_config.json (`added_tokens_decoder`) and added_tokens.json; names from
tokenizer_config.json and special_tokens_map.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError
from ochat.files import bounded_json

MOST_IDS = 1 << 24  # many times the largest published vocabulary


@dataclass(frozen=True)
class AddedToken:
    """A token that a folder declares in addition to its vocabulary."""

    text: str
    id: int
    special: bool


def read_added_tokens(folder: Path, tokenizer_json: dict[str, Any]) -> tuple[AddedToken, ...]:
    """The added tokens of all the folder's files, each once, by id; `tokenizer_json`: that file's content, {} if none.

    Raises: ConfigError where two files disagree, or for an id that no vocabulary has.
    """
    found: dict[str, AddedToken] = {}
    for token in _declared(folder, tokenizer_json):
        if not 0 <= token.id < MOST_IDS:
            raise ConfigError(f"{folder}: token {token.text!r} has the id {token.id}; at most {MOST_IDS:,} are in use")
        known = found.setdefault(token.text, token)
        if known.id != token.id:
            raise ConfigError(f"{folder}: token {token.text!r} has id {known.id} in one file and {token.id} in another")
        found[token.text] = AddedToken(token.text, token.id, known.special or token.special)
    return tuple(sorted(found.values(), key=lambda token: token.id))


def read_names(folder: Path) -> dict[str, str]:
    """The tokens that the folder's files name as "bos" and "eos". Raises: ConfigError for a damaged file."""
    config = _read_if_there(folder / "special_tokens_map.json") | _read_if_there(folder / "tokenizer_config.json")
    entries = {role: config.get(f"{role}_token") for role in ("bos", "eos")}
    texts = {role: entry.get("content") if isinstance(entry, dict) else entry for role, entry in entries.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str) and text}


def _declared(folder: Path, tokenizer_json: dict[str, Any]) -> Iterator[AddedToken]:
    for entry in tokenizer_json.get("added_tokens") or []:
        yield AddedToken(entry["content"], int(entry["id"]), bool(entry.get("special", False)))
    decoder = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for token_id, entry in decoder.items():
        yield AddedToken(entry["content"], int(token_id), bool(entry.get("special", False)))
    for text, token_id in _read_if_there(folder / "added_tokens.json").items():
        yield AddedToken(text, int(token_id), False)


def _read_if_there(path: Path) -> dict[str, Any]:
    return bounded_json.read_object(path, ConfigError, "fetch it again") if path.is_file() else {}
