"""Finds the files that make up a tokenizer, and decides by content, not by name, what they are.

files = find_tokenizer(Path("models/base")); files.kind, files.tokens
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError, how_to_fetch
from ochat.files import bounded_json
from ochat.text import sentencepiece_model
from ochat.text.added_tokens import AddedToken, read_added_tokens, read_names

KINDS = ("sentencepiece", "tiktoken", "json")  # in this order of preference where a folder holds several
_CANNOT = "is no SentencePiece model, no tokenizer.json and no file of tiktoken ranks"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer's main file, and what the other files of its folder add to it."""

    path: Path
    kind: str
    content: bytes
    tokenizer_json: dict[str, Any] = field(default_factory=dict)  # the main file as JSON, if that is its kind
    tokens: tuple[AddedToken, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # "bos", "eos" -> token


def find_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer at `path`, a file or a folder. Raises: ConfigError."""
    if path.is_file():
        main = _read_file(path)
        return main if main.kind != "json" else _with(main, names=read_names(path.parent))
    if not path.is_dir():
        raise ConfigError(f"tokenizer {str(path)!r}: no such file or folder. {how_to_fetch(path)}")
    files = _candidates(path)
    main = _preferred(files, path)
    spec = next((file.tokenizer_json for file in files if file.path.name == "tokenizer.json"), {})
    if main.kind == "sentencepiece" and _is_of_another_vocabulary(spec, main.content):
        log.warning("%s: tokenizer.json is no conversion of the SentencePiece model there: not used", path)
        spec = {}
    return _with(main, tokens=read_added_tokens(path, spec), names=read_names(path))


def _with(main: TokenizerFiles, **changes: Any) -> TokenizerFiles:
    return TokenizerFiles(**(vars(main) | changes))


def _candidates(folder: Path) -> list[TokenizerFiles]:
    """Every file of the folder that could be its tokenizer."""
    named = [folder / "tokenizer.model"] if (folder / "tokenizer.model").exists() else []
    paths = named or sorted([*folder.glob("*.model*"), *folder.glob("*.tiktoken")])
    files = [_read_file(path) for path in [*paths, folder / "tokenizer.json"] if path.is_file()]
    if not files:
        raise ConfigError(
            f"tokenizer {str(folder)!r}: no tokenizer.model, *.model, *.tiktoken or tokenizer.json in the folder"
        )
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
        sentencepiece_model.parse(content)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {_CANNOT} ({error})") from None
    return TokenizerFiles(path, "sentencepiece", content)


def _is_of_another_vocabulary(spec: dict[str, Any], content: bytes) -> bool:
    """Whether less than half of the SentencePiece pieces have their ids in a tokenizer.json that has a vocabulary."""
    vocab = (spec.get("model") or {}).get("vocab")
    if isinstance(vocab, list):  # of a unigram model: [piece, score] by id
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry[1:]}
    if not isinstance(vocab, dict) or not vocab:
        return False
    pieces = sentencepiece_model.parse(content).pieces
    return 2 * sum(vocab.get(piece.text) == i for i, piece in enumerate(pieces)) < len(pieces)
