"""The tokens that a folder declares beside a tokenizer's vocabulary.

    tokens = read(Path("models/base"), sentencepiece=content)

They stand in tokenizer.json, tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError
from ochat.files import bounded_json
from ochat.text import sentencepiece_model as spm

MOST_IDS = 1 << 24  # many times the largest published vocabulary


@dataclass(frozen=True)
class AddedToken:
    """A token that a folder declares beside its vocabulary."""

    text: str
    id: int
    special: bool


def read(folder: Path, sentencepiece: bytes | None) -> tuple[AddedToken, ...]:
    """The added tokens of all the folder's files, each once; `sentencepiece`: the model that is its tokenizer, if one
    is. Raises: ConfigError where two files disagree, or for an id that no vocabulary has."""
    found: dict[str, AddedToken] = {}
    for token in _declared(folder, sentencepiece):
        if not 0 <= token.id < MOST_IDS:
            raise ConfigError(f"{folder}: token {token.text!r} has the id {token.id}; at most {MOST_IDS:,} are in use")
        known = found.setdefault(token.text, token)
        if known.id != token.id:
            raise ConfigError(f"{folder}: token {token.text!r} has id {known.id} in one file and {token.id} in another")
        found[token.text] = AddedToken(token.text, token.id, known.special or token.special)
    return tuple(sorted(found.values(), key=lambda token: token.id))


def _declared(folder: Path, sentencepiece: bytes | None) -> Iterator[AddedToken]:
    spec = read_object(folder / "tokenizer.json")
    if sentencepiece and _is_of_another_vocabulary(spec, sentencepiece):
        what = f"{folder}: tokenizer.json is no conversion of the SentencePiece model beside it: not used"
        warnings.warn(what, stacklevel=5)
        spec = {}
    for entry in spec.get("added_tokens") or []:
        yield AddedToken(entry["content"], int(entry["id"]), bool(entry.get("special", False)))
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for token_id, entry in decoder.items():
        yield AddedToken(entry["content"], int(token_id), bool(entry.get("special", False)))
    for text, token_id in read_object(folder / "added_tokens.json").items():
        yield AddedToken(text, int(token_id), False)


def _is_of_another_vocabulary(spec: dict[str, Any], sentencepiece: bytes) -> bool:
    """Whether less than half of the pieces have their ids in a tokenizer.json that has a vocabulary."""
    vocab = (spec.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # of a unigram model: [piece, score] by id
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if _is_scored(entry)}
    if not isinstance(vocab, dict) or not vocab:
        return False
    pieces = spm.read(sentencepiece).pieces
    agree = sum(vocab.get(piece.text) == i for i, piece in enumerate(pieces))
    return 2 * agree < len(pieces)


def _is_scored(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file. Raises: ConfigError."""
    if not path.is_file():
        return {}
    return bounded_json.read_object(path, ConfigError, "fetch it again")
