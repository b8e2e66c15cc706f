"""Makes a `tokenizers.Tokenizer` of a SentencePiece BPE model, Llama 3's tiktoken ranks or a tokenizer.json.

    files = find_tokenizer(Path("models/mistral"));  model, *_ = READERS[files.kind](files, added_tokens=())

SentencePiece merges by score and tiktoken by rank, whichever two parts give a token; so each split of a token into two
others becomes a merge. Merges recovered from the vocabulary in any narrower way give other ids. An export writes the
tokenizer.json that `for_server` makes of such a tokenizer.
"""

from __future__ import annotations

import binascii
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ochat.errors import ConfigError
from ochat.text import sentencepiece_model as spm
from ochat.text.tokenizer_bounds import check_steps
from ochat.text.tokenizer_files import AddedToken, TokenizerFiles

# Llama 3's pre-tokenizer, from its published tokenizer
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS, LLAMA3_NUM_SPECIALS = 128_000, 256
LLAMA3_SPECIALS = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip

# pieces that a SentencePiece vocabulary lists as user-defined but which are marks of a chat format, so never content
_CHAT_MARK = re.compile(r"<\|[^\s<>|]+\|>|<(start|end)_of_(turn|image)>|\[/?[A-Z_]+\]")

# what an exported tokenizer splits at and drops: two Unicode noncharacters, which no text holds
BOUNDARY = "\ufdd0\ufdd1"
_BOUNDARY_SPLIT = {"type": "Split", "pattern": {"String": BOUNDARY}, "behavior": "Removed", "invert": False}


# a tokenizer, the tokens that its folder still adds to it, and the names of BOS and EOS
ReadTokenizer = tuple[tokenizers.Tokenizer, tuple[AddedToken, ...], str | None, str | None]


def _read_sentencepiece(files: TokenizerFiles, added_tokens: Collection[str]) -> ReadTokenizer:
    """A SentencePiece BPE; pieces that the folder or `added_tokens` name are special in it.

    Raises: ConfigError for a model that cannot be converted with exactly its ids, naming what prevents it.
    """
    source: spm.SentencePieceModel = files.parsed
    specials = _special_pieces(files, added_tokens)
    pieces = [(i, p) for i, p in enumerate(source.pieces) if p.text not in specials]
    symbols = [p.text for _, p in pieces if p.type == spm.USER_DEFINED]
    _refuse_inexact(files, bool(symbols))
    bpe = models.BPE(
        {p.text: i for i, p in enumerate(source.pieces)},
        _merges({p.text: (-p.score, i) for i, p in pieces if p.type == spm.NORMAL}),
        unk_token=next((p.text for p in source.pieces if p.type == spm.UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=source.byte_fallback,
    )
    model = tokenizers.Tokenizer(bpe)
    first, last = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if source.add_dummy_prefix else ([], [])
    model.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    model.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in specials])
    # a vocabulary's own symbols are looked for in the text with its blanks escaped
    model.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in symbols])
    bos, eos = (name if name in specials else None for name in (source.bos, source.eos))
    if files.adds_bos is not False:
        _set_bos(model, bos)
    return model, tuple(t for t in files.tokens if t.id >= len(source.pieces)), bos, eos


def _special_pieces(files: TokenizerFiles, added_tokens: Collection[str]) -> list[str]:
    """In order of ids: control pieces, chat marks, and those that the folder or `added_tokens` make special."""
    pieces: Sequence[spm.Piece] = files.parsed.pieces
    named = {token.text: token.id for token in files.tokens if token.special and token.id < len(pieces)}
    for text, i in named.items():
        if pieces[i].text != text:
            raise ConfigError(f"{files.path}: id {i} is {text!r} for the folder, here {pieces[i].text!r}")
    special = {*added_tokens, *named, *(p.text for p in pieces if p.type in (spm.CONTROL, spm.UNKNOWN))}
    special |= {p.text for p in pieces if p.type == spm.USER_DEFINED and _CHAT_MARK.fullmatch(p.text)}
    return [p.text for p in pieces if p.text in special]


def _refuse_inexact(files: TokenizerFiles, has_symbols: bool) -> None:
    model: spm.SentencePieceModel = files.parsed
    reasons = {
        "it is no BPE model": model.model_type != spm.BPE,
        "it normalises characters": model.normalizes,
        "it removes extra blanks": model.remove_extra_whitespaces,
        "it does not escape blanks": not model.escape_whitespaces,
        "it treats blanks as suffixes": model.whitespace_as_suffix,
        "it has unused pieces": any(piece.type == spm.UNUSED for piece in model.pieces),
        "it has user-defined pieces and a dummy prefix": has_symbols and model.add_dummy_prefix,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"{files.path}: this SentencePiece model cannot become a tokenizer.json with the same ids: {reason}; "
                "give the model's own tokenizer.json instead"
            )


def _read_tiktoken(files: TokenizerFiles, _added_tokens: Collection[str]) -> ReadTokenizer:
    """Llama 3: 128,000 byte-pair ranks, then 256 special tokens, whose names the folder may change.

    Raises: ConfigError for ranks of another model.
    """
    num_ranks = sum(1 for line in files.content.splitlines() if line)
    if num_ranks != LLAMA3_RANKS:
        raise ConfigError(
            f"{files.path}: {num_ranks} tiktoken ranks, but only Llama 3's {LLAMA3_RANKS}; use a tokenizer.json"
        )
    model = tokenizers.Tokenizer(_tiktoken_bpe(files.content))
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    model.decoder = decoders.ByteLevel()
    reserved = (f"<|reserved_special_token_{n}|>" for n in itertools.count())
    names = {LLAMA3_RANKS + i: LLAMA3_SPECIALS.get(i) or next(reserved) for i in range(LLAMA3_NUM_SPECIALS)}
    tokens = tuple(token for token in files.tokens if token.id >= LLAMA3_RANKS)
    names |= {token.id: token.text for token in tokens if token.id in names}
    model.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in names.values()])
    _set_bos(model, LLAMA3_SPECIALS[0])
    return model, tokens, LLAMA3_SPECIALS[0], LLAMA3_SPECIALS[1]


@lru_cache(maxsize=1)  # a second of work; a command may load a tokenizer several times
def _tiktoken_bpe(content: bytes) -> models.BPE:
    # GPT-2's table: the printable letter for each byte
    printable, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    letters = {byte: byte if byte in printable else next(others) for byte in range(256)}
    lines = (line.split() for line in content.splitlines() if line)
    ranks = {binascii.a2b_base64(token).decode("latin-1").translate(letters): int(rank) for token, rank in lines}
    # ignore_merges: tiktoken takes a word that is a token as one, even where no merges lead to it
    return models.BPE(ranks, _merges(ranks), ignore_merges=True)


def _merges(ranks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the lowest rank first."""
    merges = [
        (rank, (token[:k], token[k:]))
        for token, rank in ranks.items()
        for k in range(1, len(token))
        if token[:k] in ranks and token[k:] in ranks
    ]
    return [pair for _, pair in sorted(merges, key=itemgetter(0))]


def _set_bos(model: tokenizers.Tokenizer, bos: str | None) -> None:
    """Servers that ask for special tokens get BOS in front; training's templates write their own."""
    if bos is not None:
        single, pair = [bos, "$A"], [bos, "$A", "$B:1"]
        tokens = [(bos, model.token_to_id(bos))]
        model.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _read_json(files: TokenizerFiles, added_tokens: Collection[str]) -> ReadTokenizer:
    """A tokenizer.json without truncation, padding and export's boundary, its special tokens found by their bare text.

    `added_tokens` that it has are special. BOS is the one that its post-processor sets where no file names one.
    """
    spec = _without_boundary(files.parsed) | {"truncation": None, "padding": None}
    bare = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    spec["added_tokens"] = [
        entry | bare if entry.get("special") or entry["content"] in added_tokens else entry
        for entry in spec.get("added_tokens") or []
    ]
    check_steps(spec, files.path)
    names = files.names
    if not names and not (files.path.parent / "tokenizer_config.json").exists():
        first = ((spec.get("post_processor") or {}).get("single") or [{}])[0]
        names = {"bos": first["SpecialToken"]["id"]} if "SpecialToken" in first else {}
    model = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return model, files.tokens, names.get("bos"), names.get("eos")


READERS = {"sentencepiece": _read_sentencepiece, "tiktoken": _read_tiktoken, "json": _read_json}  # by kind


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
