"""Writes a tokenizer as files that transformers loads, with the same ids for any text; `load` reads them back.

    export(tokenizer, "runs/a/export", chat_template=chat_template.render(template, tokenizer), eos_token=template.eot)

SentencePiece BPE becomes a `tokenizers` BPE over the raw text, its merges recovered from the scores; tiktoken ranks
become byte-level BPE. Both keep their own tokenizer.model beside it.
For a config of model type qwen2, transformers 5's AutoTokenizer rebuilds the tokenizer by its own rules and loses the
boundary; PreTrainedTokenizerFast.from_pretrained reads the file as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.text import sentencepiece_model as spm
from ochat.text.tokenizer import (
    LLAMA3_PATTERN,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from ochat.text.tokenizer_files import BOUNDARY, BOUNDARY_SPLIT


def export(tokenizer: Tokenizer, out_dir: str | Path, *, chat_template: str, eos_token: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where the tokenizer came from one, tokenizer.model.

    `eos_token` is the token that ends a turn, so that servers stop there.
    Raises: ConfigError if the tokenizer cannot be written with exactly its ids, naming what stands in the way.
    """
    if eos_token not in tokenizer.special_tokens:
        raise ConfigError(f"export: {eos_token!r} is no special token of the tokenizer")
    spec = tokenizer_json(tokenizer)
    if BOUNDARY in chat_template:
        spec = with_boundary(spec)
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_json(folder / "tokenizer.json", spec)
    atomic.write_json(folder / "tokenizer_config.json", _config(tokenizer, chat_template, eos_token))
    atomic.write_json(folder / "special_tokens_map.json", _names(tokenizer, eos_token))
    if tokenizer.kind in ("sentencepiece", "tiktoken"):
        (folder / "tokenizer.model").write_bytes(tokenizer.content)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json with the tokenizer's ids for any text. Raises: ConfigError."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        return _from_tiktoken(tokenizer)
    return _per_segment(json.loads(tokenizer.content))


def with_boundary(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json, splitting at BOUNDARY and dropping it before anything else happens."""
    own = [spec["pre_tokenizer"]] if spec["pre_tokenizer"] else []
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BOUNDARY_SPLIT, *own]}}


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    model = spm.read(tokenizer.content)
    _refuse_inexact(model)
    unknown = next((p.text for p in model.pieces if p.type == spm.UNKNOWN), None)
    dummy = model.add_dummy_prefix
    prepend = [{"type": "Prepend", "prepend": "▁"}] if dummy else []
    to_blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy else []
    own = {p.text: i for i, p in enumerate(model.pieces) if p.type == spm.USER_DEFINED}
    return _spec(
        tokenizer,
        ordinary=own,
        normalizer=_sequence(
            "normalizers", [*prepend, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        ),
        pre_tokenizer=None,
        decoder=_sequence("decoders", [to_blank, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]),
        model={"unk_token": unknown, "fuse_unk": True, "byte_fallback": model.byte_fallback, "ignore_merges": False}
        | {"vocab": {p.text: i for i, p in enumerate(model.pieces)}, "merges": _merges_by_score(model)},
    )


def _refuse_inexact(model: spm.SentencePieceModel) -> None:
    types = {p.type for p in model.pieces}
    reasons = {
        "it is no BPE model": model.model_type != spm.BPE,
        "it normalises characters": model.normalizes,
        "it removes extra blanks": model.remove_extra_whitespaces,
        "it does not escape blanks": not model.escape_whitespaces,
        "it treats blanks as suffixes": model.whitespace_as_suffix,
        "it has unused pieces": spm.UNUSED in types,
        "it has user-defined pieces and a dummy prefix": spm.USER_DEFINED in types and model.add_dummy_prefix,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"export: this SentencePiece model cannot become a tokenizer.json with the same ids: {reason}"
            )


def _merges_by_score(model: spm.SentencePieceModel) -> list[list[str]]:
    """Every way to make a piece of two others; the best score first, as SentencePiece merges."""
    ids = {p.text: i for i, p in enumerate(model.pieces) if p.type == spm.NORMAL}
    merges = []
    for text, i in ids.items():
        splits = ((text[:k], text[k:]) for k in range(1, len(text)))
        merges += [(-model.pieces[i].score, i, [left, right]) for left, right in splits if left in ids and right in ids]
    return [pair for _, _, pair in sorted(merges, key=lambda merge: merge[:2])]


def _from_tiktoken(tokenizer: TiktokenTokenizer) -> dict[str, Any]:
    letters = byte_letters()
    vocab = {"".join(letters[b] for b in token): rank for token, rank in tokenizer.ranks.items()}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return _spec(
        tokenizer,
        ordinary={},
        normalizer=None,
        pre_tokenizer=_sequence("pretokenizers", [split, byte_level]),
        decoder=byte_level,
        model={"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
        | {"vocab": vocab, "merges": merges_by_rank(vocab)},
    )


def merges_by_rank(vocab: Mapping[str, int]) -> list[list[str]]:
    """Every way to make a token of two others; the lowest rank first, as tiktoken merges."""
    merges = []
    for token, rank in vocab.items():
        splits = ((token[:k], token[k:]) for k in range(1, len(token)))
        merges += [(rank, [left, right]) for left, right in splits if left in vocab and right in vocab]
    return [pair for _, pair in sorted(merges, key=lambda merge: merge[0])]


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _per_segment(spec: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose dummy prefix comes at every section, as it does when each segment is encoded alone."""
    if not spec["pre_tokenizer"]:
        return spec
    pre = {"pretokenizers": [], **spec["pre_tokenizer"]}
    steps = [_always(step) for step in pre["pretokenizers"]]
    return spec | {
        "pre_tokenizer": _always(pre) | {"pretokenizers": steps} if steps else _always(spec["pre_tokenizer"])
    }


def _always(step: dict[str, Any]) -> dict[str, Any]:
    return step | {"prepend_scheme": "always"} if step.get("prepend_scheme") == "first" else step


def _spec(
    tokenizer: Tokenizer,
    *,
    ordinary: dict[str, int],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    added = [_added(token, i, special=True) for token, i in tokenizer.special_tokens.items()]
    added += [_added(token, i, special=False) for token, i in ordinary.items()]
    bpe = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda entry: entry["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _bos_in_front(tokenizer),
        "decoder": decoder,
        "model": bpe | model,
    }


def _added(token: str, token_id: int, *, special: bool) -> dict[str, Any]:
    """Special tokens are looked for in the raw text, a vocabulary's own symbols in the text with its blanks escaped."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"id": token_id, "content": token, "special": special, "normalized": not special} | flags


def _bos_in_front(tokenizer: Tokenizer) -> dict[str, Any] | None:
    if tokenizer.bos is None:
        return None
    bos = {"SpecialToken": {"id": tokenizer.bos, "type_id": 0}}
    single = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {tokenizer.bos: {"id": tokenizer.bos, "ids": [tokenizer.bos_id], "tokens": [tokenizer.bos]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _sequence(key: str, steps: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def _names(tokenizer: Tokenizer, eos_token: str) -> dict[str, str]:
    return ({"bos_token": tokenizer.bos} if tokenizer.bos else {}) | {"eos_token": eos_token}


def _config(tokenizer: Tokenizer, chat_template: str, eos_token: str) -> dict[str, Any]:
    names = _names(tokenizer, eos_token)
    # clean-up would change decoded text ("do n't"), which then encodes to other ids
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return fixed | names | {"chat_template": chat_template}
