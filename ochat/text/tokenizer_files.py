"""Finds the files that make up a tokenizer, and decides by content, not by name, what they are.

    files = find_tokenizer(Path("models/base")); files.kind, files.tokens

The tokens that a folder adds to its vocabulary come from tokenizer.json, tokenizer_config.json
(`added_tokens_decoder`) and added_tokens.json; the names of BOS and EOS from tokenizer_config.json and
special_tokens_map.json.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ochat.errors import ConfigError, how_to_fetch
from ochat.files import bounded_json, model_folder
from ochat.text import sentencepiece_model
from ochat.text.sentencepiece_model import Piece

KINDS = ("sentencepiece", "tiktoken", "json")  # in this order of preference where a folder holds several
_CANNOT = "is no SentencePiece model, no tokenizer.json and no file of tiktoken ranks"
MOST_IDS = 1 << 24  # many times the largest published vocabulary
log = logging.getLogger(__name__)


class AddedToken(NamedTuple):
    """A token that a folder declares in addition to its vocabulary."""

    text: str
    id: int
    special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's main file, and what the other files of its folder add to it."""

    path: Path
    kind: str
    content: bytes
    parsed: Any = None  # the content of a tokenizer.json, or a SentencePieceModel
    tokens: tuple[AddedToken, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # "bos", "eos" -> token
    adds_bos: bool | None = None  # whether BOS is put in front of a text; None: the main file says it


def find_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer at `path`, a file or a folder. Raises: ConfigError."""
    if path.is_file():
        main = _read_file(path)
        beside = {"names": _read_names(path.parent), "adds_bos": _read_adds_bos(path.parent)}
        return replace(main, **beside) if main.kind == "json" else main
    if not path.is_dir():
        raise ConfigError(f"tokenizer {str(path)!r}: no such file or folder. {how_to_fetch(path)}")
    files = _candidates(path)
    main = _preferred(files, path)
    spec = next((f.parsed for f in files if f.path.name == "tokenizer.json" and f.kind == "json"), {})
    if main.kind == "sentencepiece" and _is_of_another_vocabulary(spec, main.parsed.pieces):
        log.warning("%s: tokenizer.json is no conversion of the SentencePiece model there: not used", path)
        spec = {}
    tokens = _read_added_tokens(path, spec)
    return replace(main, tokens=tokens, names=_read_names(path), adds_bos=_read_adds_bos(path))


def _candidates(folder: Path) -> list[TokenizerFiles]:
    """Every file of the folder that could be its tokenizer."""
    named = [folder / "tokenizer.model"] if (folder / "tokenizer.model").exists() else []
    paths = named or sorted([*folder.glob("*.model*"), *folder.glob("*.tiktoken")])
    files = [_read_file(path) for path in [*paths, folder / "tokenizer.json"] if path.is_file()]
    if not files:
        advice = f". {model_folder.how_to_get_base(folder)}" if model_folder.has_only_gguf(folder) else ""
        names = "tokenizer.model, *.model, *.tiktoken or tokenizer.json"
        raise ConfigError(f"tokenizer {str(folder)!r}: no {names} in the folder{advice}")
    return files


def _preferred(files: list[TokenizerFiles], folder: Path) -> TokenizerFiles:
    best = min((file.kind for file in files), key=KINDS.index)
    first, *others = (file for file in files if file.kind == best)
    if others:
        names = ", ".join(file.path.name for file in (first, *others))
        raise ConfigError(f"tokenizer {str(folder)!r}: several {best} files ({names}); name the one that is meant")
    return first


def _read_file(path: Path) -> TokenizerFiles:
    """One file and its kind, which its content decides."""
    if path.stat().st_size > bounded_json.MAX_BYTES:
        raise ConfigError(f"{path}: {_CANNOT} (it has more than {bounded_json.MAX_BYTES >> 20} MiB)")
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path}: a Git LFS pointer instead of the file; fetch it with `git lfs pull`")
    if re.match(rb"\s*\{", content):
        spec = bounded_json.read_object(path, ConfigError, "fetch it again")
        if not isinstance(spec.get("model"), dict):
            raise ConfigError(f"{path}: JSON, but not of the `tokenizers` library: it has no `model` section")
        return TokenizerFiles(path, "json", content, spec)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", content):
        return TokenizerFiles(path, "tiktoken", content)
    try:
        return TokenizerFiles(path, "sentencepiece", content, sentencepiece_model.parse(content))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {_CANNOT} ({error})") from None


def _is_of_another_vocabulary(spec: dict[str, Any], pieces: Sequence[Piece]) -> bool:
    """Whether less than half of the SentencePiece pieces have their ids in a tokenizer.json that has a vocabulary."""
    vocab = (spec.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # of a unigram model: [piece, score] by id
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry[1:]}
    if not isinstance(vocab, dict) or not vocab:
        return False
    return 2 * sum(vocab.get(piece.text) == i for i, piece in enumerate(pieces)) < len(pieces)


def _read_added_tokens(folder: Path, tokenizer_json: dict[str, Any]) -> tuple[AddedToken, ...]:
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
        found[token.text] = token._replace(special=known.special or token.special)
    return tuple(sorted(found.values(), key=lambda token: token.id))


def _read_names(folder: Path) -> dict[str, str]:
    """The tokens that the folder's files name as "bos" and "eos". Raises: ConfigError for a damaged file."""
    config = _read_if_there(folder / "special_tokens_map.json") | _read_if_there(folder / "tokenizer_config.json")
    entries = {role: config.get(f"{role}_token") for role in ("bos", "eos")}
    texts = {role: entry.get("content") if isinstance(entry, dict) else entry for role, entry in entries.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str) and text}


def _read_adds_bos(folder: Path) -> bool | None:
    adds = _read_if_there(folder / "tokenizer_config.json").get("add_bos_token")
    return adds if isinstance(adds, bool) else None


def _declared(folder: Path, tokenizer_json: dict[str, Any]) -> list[AddedToken]:
    decoder = _read_if_there(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    more = _read_if_there(folder / "added_tokens.json")
    entries = [*((entry["id"], entry) for entry in tokenizer_json.get("added_tokens") or []), *decoder.items()]
    entries += [(token_id, {"content": text}) for text, token_id in more.items()]
    return [AddedToken(entry["content"], int(i), bool(entry.get("special", False))) for i, entry in entries]


def _read_if_there(path: Path) -> dict[str, Any]:
    return bounded_json.read_object(path, ConfigError, "fetch it again") if path.is_file() else {}
