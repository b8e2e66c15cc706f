"""A tokenizer of the `tokenizers` library, from any kind of tokenizer files; training and export use the same one.

    tokenizer = load("models/base", added_tokens=("<|end_of_turn|>",)); tokenizer.encode("hello")

`encode` treats its text as content: a special token written in it becomes ordinary text. `encode_with_specials` is for
what templates write themselves. A SentencePiece model or tiktoken ranks are converted when they are loaded, with the
same ids (tokenizer_convert.py), in about a second.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from ochat.errors import ConfigError, OchatError
from ochat.files import atomic
from ochat.text.fields import check_unicode
from ochat.text.tokenizer_convert import BOUNDARY, READERS, for_server
from ochat.text.tokenizer_files import MOST_IDS, AddedToken, TokenizerFiles, find_tokenizer

PANIC = "PanicException"  # the library's, which has no module
FREE_IDS = 1024  # that may lie between those of a vocabulary, beside as many again as it has
MAX_PREFIXES = 4096  # ids of role prefixes that are kept: a template's roles times the data's classes


def load(path: str | Path, added_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer in a folder or file.

    A folder's own added tokens count. `added_tokens` that it lacks get the next free ids; those it has keep theirs and
    are special from then on. In a folder with several kinds, SentencePiece wins, then tiktoken.
    Raises: ConfigError saying what was looked for, that it is damaged, or why it cannot be converted.
    """
    try:
        return _load(find_tokenizer(Path(path)), tuple(added_tokens))
    except (OchatError, OSError):
        raise
    except BaseException as error:
        # the library's errors have no class of their own, its panics are no Exception, and a file of another shape
        # breaks wherever it is read
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise ConfigError(
            f"tokenizer {str(path)!r}: damaged, or of another schema ({error!r}); fetch it again"
        ) from None


def _load(files: TokenizerFiles, added_tokens: tuple[str, ...]) -> Tokenizer:
    model, tokens, bos, eos = READERS[files.kind](files, added_tokens)
    _add_tokens(model, tokens, added_tokens, files.path)
    content = b"" if files.kind == "json" else files.content
    tokenizer = Tokenizer(model, bos, eos, files.kind, content, files.adds_bos)
    count = model.get_vocab_size(with_added_tokens=True)
    if tokenizer.vocab_size > min(2 * count + FREE_IDS, MOST_IDS):
        last = f"an id of {tokenizer.vocab_size - 1:,}, for which an embedding would need rows"
        raise ConfigError(f"{files.path}: {last}, and only {count:,} tokens; fetch it again")
    for role, name in (("bos", bos), ("eos", eos)):
        if name is not None and name not in tokenizer.special_tokens:
            raise ConfigError(f"{files.path}: the {role} token {name!r} is no special token of tokenizer.json")
    return tokenizer


def _add_tokens(
    model: tokenizers.Tokenizer, declared: Sequence[AddedToken], added_tokens: Sequence[str], path: Path
) -> None:
    """Makes the folder's tokens and `added_tokens` special; those that have no id get the next free ones."""
    ids = {token.text: token.id for token in declared if model.token_to_id(token.text) is None}
    free = itertools.count(max([*model.get_vocab(with_added_tokens=True).values(), *ids.values()]) + 1)
    if "" in added_tokens:
        raise ConfigError("added tokens: an empty token cannot be added")
    for token in added_tokens:
        known = ids.get(token, model.token_to_id(token))
        ids[token] = next(free) if known is None else known
    for token, token_id in sorted(ids.items(), key=lambda item: item[1]):
        model.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        if model.token_to_id(token) != token_id:  # the library hands out ids itself
            raise ConfigError(
                f"{path}: cannot give {token!r} the id {token_id}, as tokenizer_config.json or added_tokens.json say; "
                "the ids before it have a gap"
            )


@contextmanager
def _explained() -> Iterator[None]:
    """Raises: ConfigError where the library panics: a pattern of the file that takes forever on some text."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != PANIC:
            raise
        raise ConfigError(f"the tokenizer cannot encode this text ({error}); fetch it again") from None


class Tokenizer:
    """A `tokenizers.Tokenizer` whose special tokens are text in content, and live in prefixes. Pickles."""

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        bos: str | None,
        eos: str | None,
        kind: str = "json",
        content: bytes = b"",
        says_adds_bos: bool | None = None,
    ) -> None:
        model.encode_special_tokens = True
        self.model = model  # the library's own
        self.bos, self.eos = bos, eos
        self.says_adds_bos = says_adds_bos  # in tokenizer_config.json; None: nothing
        self.kind, self.content = kind, content  # what it was converted from: sentencepiece or tiktoken, and that file
        # text -> id; escaped in content, live in prefixes
        self.special_tokens = {t.content: i for i, t in model.get_added_tokens_decoder().items() if t.special}
        self.bos_id, self.eos_id = (self.special_tokens.get(name or "") for name in (bos, eos))
        self._special_ids = set(self.special_tokens.values())
        longest_first = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        self._special_pattern = re.compile(f"({longest_first})" if longest_first else "(?!)")
        # ids of a template's prefixes, which come again and again
        self.prefix_ids = lru_cache(MAX_PREFIXES)(lambda text: tuple(self.encode_with_specials(text)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.bos, self.eos, self.kind, self.content, self.says_adds_bos)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; special tokens written in it are text. Raises: DataError for a lone surrogate."""
        check_unicode(text)
        with _explained():
            return self.model.encode(text, add_special_tokens=False).ids if text else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores. Raises: DataError if any of them cannot be encoded."""
        for text in texts:
            check_unicode(text)
        with _explained():
            encodings = self.model.encode_batch_fast(
                list(texts), add_special_tokens=False
            )  # a third faster: no offsets
        return [encoding.ids if text else [] for text, encoding in zip(texts, encodings, strict=True)]

    def encode_with_offsets(
        self, texts: Sequence[str], *, specials: bool
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Of each text its ids, and the characters of each token. `specials`: special tokens in it are special."""
        for text in texts:
            check_unicode(text)
        self.model.encode_special_tokens = not specials
        try:
            with _explained():
                encodings = self.model.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self.model.encode_special_tokens = True
        return [(each.ids, each.offsets) if text else ([], []) for text, each in zip(texts, encodings, strict=True)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which special tokens are live; what is between them is encoded alone."""
        ids: list[int] = []
        for part in self.split_at_specials(text):
            special = self.special_tokens.get(part)
            ids += self.encode(part) if special is None else [special]
        return ids

    def split_at_specials(self, text: str) -> list[str]:
        """The text in turns: ordinary (possibly empty), special, ordinary, ...; the longest special token wins."""
        return self._special_pattern.split(text)

    def spells_special(self, text: str) -> bool:
        """Whether the text spells a special token."""
        return self._special_pattern.search(text) is not None

    def find_specials(self, text: str) -> Iterator[re.Match[str]]:
        """The special tokens that the text spells, in order."""
        return self._special_pattern.finditer(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; each stretch between them is decoded alone, as it was encoded.

        An id that it does not know (a padded embedding row, say) becomes U+FFFD.
        """
        texts = []
        for is_ordinary, stretch in itertools.groupby(ids, self._is_ordinary):
            if is_ordinary:
                texts.append(self.model.decode(list(stretch), skip_special_tokens=False))
            else:
                texts += ["" if i in self._special_ids else "\ufffd" for i in stretch]
        return "".join(texts)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids that come one by one, each part as soon as its characters are whole; together `decode`'s."""
        known: list[int] = []
        text = shown = ""
        for token_id in ids:
            known.append(token_id)
            text = self.decode(known)
            whole = text.rstrip("\ufffd")  # at the end it may be the first bytes of a character
            if len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
        if text[len(shown) :]:
            yield text[len(shown) :]

    def _is_ordinary(self, token_id: int) -> bool:
        return token_id not in self._special_ids and token_id >= 0 and self.model.id_to_token(token_id) is not None

    def token_text(self, token_id: int) -> str:
        """A vocabulary entry as the library spells it, "?" for an id that it does not know."""
        return self.model.id_to_token(token_id) or "?"

    @cached_property
    def adds_bos(self) -> bool:
        """Whether BOS comes in front of a text by the tokenizer's own rules: those of tokenizer_config.json, or else of
        its post-processor."""
        if self.says_adds_bos is not None and self.bos is not None:
            return self.says_adds_bos
        return self._writes_bos

    @cached_property
    def _writes_bos(self) -> bool:
        return self.bos is not None and self.model.encode("", add_special_tokens=True).ids[:1] == [self.bos_id]

    @cached_property
    def spells_all(self) -> bool:
        """Whether it has tokens for all bytes, so that no letter is lost."""
        as_letters = ByteLevel.alphabet()  # the 256 letters that byte-level tokenizers write bytes as
        as_bytes = (f"<0x{byte:02X}>" for byte in range(256))
        return any(all(self.model.token_to_id(each) is not None for each in known) for known in (as_letters, as_bytes))

    def count_unknown(self, texts: Sequence[str]) -> int:
        """Letters that the vocabulary lacks: those of the unknown token, and those that no token holds."""
        name = getattr(self.model.model, "unk_token", None)
        unknown = None if name is None else self.model.token_to_id(name)
        count = 0
        for text, (ids, offsets) in zip(texts, self.encode_with_offsets(texts, specials=False), strict=True):
            is_known = [character.isspace() for character in text]
            for token, (start, end) in zip(ids, offsets, strict=True):
                is_known[start:end] = [token != unknown] * (end - start)
            count += is_known.count(False)
        return count

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows that an embedding needs."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def pieces(self) -> list[str]:
        """The vocabulary without added tokens, as the library spells it."""
        return list(self.model.get_vocab(with_added_tokens=False))

    @property
    def has_dummy_prefix(self) -> bool:
        """Whether every segment gets a "▁" in front, so that a literal blank there says the same."""
        normalizer = self.model.normalizer
        return normalizer is not None and normalizer.normalize_str("x") == "▁x"

    def to_json(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        return json.loads(self.model.to_str())

    def fingerprint(self) -> str:
        """sha256 over kind, content and special tokens: equal exactly if the ids of every text are."""
        content = self.content
        if not content:
            # the library's own spelling, without what never touches ids: the same before and after an export
            kept = {key: value for key, value in self.to_json().items() if key not in ("post_processor", "decoder")}
            content = json.dumps(kept, sort_keys=True).encode()
        specials = json.dumps(sorted(self.special_tokens.items()))
        parts = [self.kind.encode(), content, specials.encode()]
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def save(self, folder: Path, *, chat_template: str, eos_token: str) -> None:
        """Writes the files that transformers loads, and the tokenizer.model that it was converted from, if any.

        `eos_token` is the token that ends a turn, so that servers stop there. For a config of model type qwen2,
        transformers 5's AutoTokenizer rebuilds the tokenizer by its own rules and loses the boundary;
        PreTrainedTokenizerFast.from_pretrained reads the file as it is.
        Raises: ConfigError unless `eos_token` is a special token.
        """
        if eos_token not in self.special_tokens:
            raise ConfigError(f"export: {eos_token!r} is no special token of the tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, Any] = ({"bos_token": self.bos} if self.bos else {}) | {"eos_token": eos_token}
        if self.bos and self.adds_bos != (self.kind != "json" or self._writes_bos):  # what reading it back would find
            names["add_bos_token"] = self.adds_bos
        if self.kind == "sentencepiece":  # what reads tokenizer.model (llama.cpp's converter) finds no others
            flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            added = self.special_tokens.keys() - self.pieces
            names["added_tokens_decoder"] = {
                str(i): {"content": token, **flags} for token, i in self.special_tokens.items() if token in added
            }
        # clean-up would change decoded text ("do n't"), which then encodes to other ids
        fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        atomic.write_json(folder / "tokenizer.json", for_server(self.to_json(), boundary=BOUNDARY in chat_template))
        atomic.write_json(folder / "tokenizer_config.json", fixed | names | {"chat_template": chat_template})
        named = {key: text for key, text in names.items() if key in ("bos_token", "eos_token")}
        atomic.write_json(folder / "special_tokens_map.json", named)
        if self.content:
            (folder / "tokenizer.model").write_bytes(self.content)
