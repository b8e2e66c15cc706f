"""Finds the files that make up a tokenizer, tells their kind by content, and works out its special tokens.

    files = find(Path("models/base")); files.kind, files.tokens

The tokens that a folder declares beside it: declared_tokens.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from ochat.errors import ConfigError, how_to_fetch
from ochat.files import bounded_json
from ochat.text import added_tokens as added_tokens_module
from ochat.text import sentencepiece_model as spm
from ochat.text.added_tokens import AddedToken, read_object

KINDS = ("sentencepiece", "tiktoken", "json")  # in this order of preference where a folder holds several
LLAMA3_RANKS = 128_000
LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip

# what an exported tokenizer splits at and drops: two Unicode noncharacters, which no text holds
BOUNDARY = "\ufdd0\ufdd1"
BOUNDARY_SPLIT = {"type": "Split", "pattern": {"String": BOUNDARY}, "behavior": "Removed", "invert": False}

# pieces that a SentencePiece vocabulary lists as user-defined but which are marks of a chat format, so never content
_CHAT_MARK = re.compile(r"<\|[^\s<>|]+\|>|<(start|end)_of_(turn|image)>|\[/?[A-Z_]+\]")
_CANNOT = "is no SentencePiece model, no tokenizer.json and no file of tiktoken ranks"


@dataclass(frozen=True)
class TokenizerFiles:
    """One tokenizer's main file and what its folder declares beside it."""

    path: Path
    kind: str
    content: bytes
    tokens: tuple[AddedToken, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # "bos", "eos" -> token, from tokenizer_config.json


def find(path: Path) -> TokenizerFiles:
    """The tokenizer at `path`, a file or a folder. Raises: ConfigError."""
    if path.is_file():
        kind = _kind_of(path)
        names = _names(path.parent) if kind == "json" else {}
        return TokenizerFiles(path, kind, path.read_bytes(), names=names)
    if not path.is_dir():
        raise ConfigError(f"tokenizer {str(path)!r}: no such file or folder. {how_to_fetch(path)}")
    file, kind = _main_file(path)
    content = file.read_bytes()
    tokens = added_tokens_module.read(path, content if kind == "sentencepiece" else None)
    return TokenizerFiles(file, kind, content, tokens, _names(path))


def _main_file(folder: Path) -> tuple[Path, str]:
    named = [folder / "tokenizer.model"] if (folder / "tokenizer.model").exists() else []
    candidates = named or sorted([*folder.glob("*.model*"), *folder.glob("*.tiktoken")])
    found = [(file, _kind_of(file)) for file in [*candidates, folder / "tokenizer.json"] if file.is_file()]
    if not found:
        raise ConfigError(
            f"tokenizer {str(folder)!r}: no tokenizer.model, *.model, *.tiktoken or tokenizer.json in the folder"
        )
    best = min((kind for _, kind in found), key=KINDS.index)
    files = [file for file, kind in found if kind == best]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"tokenizer {str(folder)!r}: several {best} files ({names}); name the one that is meant")
    return files[0], best


def _kind_of(path: Path) -> str:
    if path.stat().st_size > bounded_json.MAX_BYTES:
        raise ConfigError(f"{path}: {_CANNOT} (it has more than {bounded_json.MAX_BYTES >> 20} MiB)")
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path}: a Git LFS pointer instead of the file; fetch it with `git lfs pull`")
    if re.match(rb"\s*\{", content):
        if isinstance(read_object(path).get("model"), dict):
            return "json"
        raise ConfigError(f"{path}: JSON, but not of the `tokenizers` library: it has no `model` section")
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", content):
        return "tiktoken"
    try:
        spm.read(content)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {_CANNOT} ({error})") from None
    return "sentencepiece"


def _names(folder: Path) -> dict[str, str]:
    """The BOS and EOS tokens that tokenizer_config.json (or special_tokens_map.json) names."""
    config = read_object(folder / "special_tokens_map.json") | read_object(folder / "tokenizer_config.json")
    entries = {role: config.get(f"{role}_token") for role in ("bos", "eos")}
    texts = {role: entry.get("content") if isinstance(entry, dict) else entry for role, entry in entries.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str) and text}


def append_tokens(specials: dict[str, int], added_tokens: Sequence[str], next_id: int) -> dict[str, int]:
    """`specials` and, from `next_id` on, the `added_tokens` that it lacks. Raises: ConfigError for an empty token."""
    result = dict(specials)
    for token in added_tokens:
        if not token:
            raise ConfigError("added tokens: an empty token cannot be added")
        if token not in result:
            result[token] = next_id
            next_id += 1
    return result


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model and the tokens its folder adds."""

    files: TokenizerFiles
    model: spm.SentencePieceModel

    def with_added(self, added_tokens: Sequence[str]) -> dict[str, int]:
        """Special token -> id: control pieces, chat marks, the folder's tokens, then `added_tokens`."""
        pieces = self.model.pieces
        specials = {p.text: i for i, p in enumerate(pieces) if _is_special(p)}
        for token in self.files.tokens:
            if token.id >= len(pieces):
                specials[token.text] = token.id
            elif token.special:
                own = pieces[token.id].text
                if own != token.text:
                    raise ConfigError(
                        f"{self.files.path}: id {token.id} is {token.text!r} for the folder, here {own!r}"
                    )
                specials[token.text] = token.id
        by_text = {p.text: i for i, p in enumerate(pieces)}
        specials |= {token: by_text[token] for token in added_tokens if token in by_text}
        return append_tokens(specials, added_tokens, max(len(pieces), max(specials.values(), default=-1) + 1))

    def escaping(self, specials: dict[str, int]) -> bytes:
        """The model file in which no special token is a piece that text can turn into."""
        pieces = self.model.pieces
        live = (i for i in specials.values() if i < len(pieces) and pieces[i].type not in (spm.CONTROL, spm.UNKNOWN))
        return spm.with_types(self.files.content, dict.fromkeys(live, spm.CONTROL))


def read_sentencepiece(files: TokenizerFiles) -> SentencePieceVocabulary:
    """The vocabulary of a SentencePiece file."""
    return SentencePieceVocabulary(files, spm.read(files.content))


def _is_special(piece: spm.Piece) -> bool:
    is_mark = piece.type == spm.USER_DEFINED and _CHAT_MARK.fullmatch(piece.text)
    return piece.type in (spm.CONTROL, spm.UNKNOWN) or bool(is_mark)


def llama3_specials(files: TokenizerFiles, added_tokens: Sequence[str]) -> dict[str, int]:
    """Special token -> id for tiktoken ranks; the folder's names win over Llama 3.1's.

    Raises: ConfigError for ranks of another model.
    """
    count = sum(1 for line in files.content.splitlines() if line)
    if count != LLAMA3_RANKS:
        raise ConfigError(
            f"{files.path}: {count} tiktoken ranks, but only Llama 3's {LLAMA3_RANKS}; use a tokenizer.json"
        )
    names, reserved = {}, 0
    for i in range(256):
        names[count + i] = LLAMA3_SPECIALS.get(i) or f"<|reserved_special_token_{reserved}|>"
        reserved += i not in LLAMA3_SPECIALS
    names |= {token.id: token.text for token in files.tokens if token.id >= count}
    return append_tokens({text: i for i, text in names.items()}, added_tokens, max(names) + 1)


def read_json(files: TokenizerFiles, added_tokens: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    """A tokenizer.json without truncation, padding and export's boundary, all tokens added, and its special tokens.

    Raises: ConfigError where the library would give an added token another id than the next free one.
    """
    spec = without_boundary(json.loads(files.content))
    spec |= {"truncation": None, "padding": None}
    for entry in spec.get("added_tokens") or []:
        if entry.get("special") or entry["content"] in added_tokens:
            # found by their bare text: no blank beside them belongs to them
            entry |= {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    wanted = {token.text: token.id for token in files.tokens if model.token_to_id(token.text) is None}
    present = {token: i for token in added_tokens if (i := model.token_to_id(token)) is not None}
    largest = max([*model.get_vocab(with_added_tokens=True).values(), *wanted.values()])
    wanted = append_tokens(wanted | present, added_tokens, largest + 1)
    for text, token_id in sorted(wanted.items(), key=lambda item: item[1]):
        model.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True)])
        if model.token_to_id(text) != token_id:
            raise ConfigError(f"{files.path}: cannot give {text!r} the id {token_id}; the ids before it have a gap")
    specials = {t.content: i for i, t in model.get_added_tokens_decoder().items() if t.special}
    return model.to_str().encode("utf-8"), specials


def json_names(files: TokenizerFiles) -> dict[str, str]:
    """The BOS and EOS tokens named beside a tokenizer.json; if nothing is, the BOS that its post-processor sets."""
    first = ((json.loads(files.content).get("post_processor") or {}).get("single") or [{}])[0]
    if files.names or (files.path.parent / "tokenizer_config.json").exists() or "SpecialToken" not in first:
        return files.names
    return {"bos": first["SpecialToken"]["id"]}


def without_boundary(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json before `tokenizer_export` put the boundary in front of its pre-tokenizer."""
    pre = spec.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) else None
    if not steps or steps[0].get("pattern") != BOUNDARY_SPLIT["pattern"]:
        return spec
    return spec | {"pre_tokenizer": steps[1] if len(steps) > 1 else None}
