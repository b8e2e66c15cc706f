"""Three kinds of tokenizer behind one small interface: SentencePiece, `tokenizer.json`, Llama 3's tiktoken ranks.

    tokenizer = load("models/base", added_tokens=("<|end_of_turn|>",)); tokenizer.encode("hello")

`encode` treats its text as content: a special token written in it becomes ordinary text. `encode_with_specials` is for
what templates write themselves. tokenizer_files.py decides which files make up a tokenizer, by content and not by name.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import sentencepiece
import tiktoken
import tokenizers

from ochat.errors import ConfigError, DataError, OchatError
from ochat.text import tokenizer_files

# Llama 3's pre-tokenizer, from its published tokenizer
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_PREFIXES = 4096  # ids of role prefixes that are kept: a template's roles times the data's classes


def load(path: str | Path, added_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer in a folder or file.

    A folder's own added tokens count. `added_tokens` that it lacks get the next free ids; those it has keep theirs and
    are special from then on. In a folder with several kinds, SentencePiece wins, then tiktoken.
    Raises: ConfigError saying what was looked for, or that it is damaged.
    """
    try:
        files = tokenizer_files.find(Path(path))
        return _KINDS[files.kind].from_files(files, tuple(added_tokens))
    except (OchatError, OSError):
        raise
    except BaseException as error:
        # the libraries' errors have no class of their own, and a file of another shape breaks wherever it is read
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise ConfigError(
            f"tokenizer {str(path)!r}: damaged, or of another schema ({error!r}); fetch it again"
        ) from None


class Tokenizer:
    """What all kinds share: special tokens, splitting at them, decoding around them. Pickles as its content."""

    kind: ClassVar[str]

    def __init__(self, content: bytes, special_tokens: dict[str, int], bos: str | None, eos: str | None) -> None:
        self.content = content
        self.special_tokens = special_tokens  # text -> id; escaped in content, live in prefixes
        self.bos, self.eos = bos, eos
        self._prefixes: dict[str, tuple[int, ...]] = {}

    @classmethod
    def from_files(cls, files: tokenizer_files.TokenizerFiles, added_tokens: tuple[str, ...]) -> Tokenizer:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; special tokens written in it are text. Raises: DataError for a lone surrogate."""
        _check_unicode(text)
        return self._encode(text) if text else []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, by the library's fastest way. Raises: DataError if any of them cannot be encoded."""
        for text in texts:
            _check_unicode(text)
        return self._encode_batch(texts)

    def prefix_ids(self, text: str) -> tuple[int, ...]:
        """`encode_with_specials` of a text that comes again and again."""
        ids = self._prefixes.get(text)
        if ids is None:
            if len(self._prefixes) == MAX_PREFIXES:
                self._prefixes.clear()
            ids = self._prefixes[text] = tuple(self.encode_with_specials(text))
        return ids

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of text in which special tokens are live; what stands between them is encoded alone."""
        ids: list[int] = []
        for part in self.split_at_specials(text):
            special = self.special_tokens.get(part)
            ids += self.encode(part) if special is None else [special]
        return ids

    def split_at_specials(self, text: str) -> list[str]:
        """The text in turns: ordinary (possibly empty), special, ordinary, ...; the longest special token wins."""
        return self._special_pattern.split(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; each stretch between special tokens is decoded alone, as it was encoded.

        An id that it does not know (a padded embedding row, say) becomes U+FFFD.
        """
        return "".join(self._decode_stretches(ids, skip_special))

    def token_id(self, token: str) -> int | None:
        """The id of a special token or a vocabulary entry, None if there is none."""
        special = self.special_tokens.get(token)
        return self._piece_id(token) if special is None else special

    @property
    def bos_id(self) -> int | None:
        return None if self.bos is None else self.special_tokens[self.bos]

    @property
    def eos_id(self) -> int | None:
        return None if self.eos is None else self.special_tokens[self.eos]

    @property
    def vocab_size(self) -> int:
        """Largest id plus one: the rows that an embedding needs."""
        return max(self._base_size, max(self.special_tokens.values(), default=-1) + 1)

    def fingerprint(self) -> str:
        """sha256 over kind, content and special tokens: equal exactly if the ids of every text are."""
        specials = json.dumps(sorted(self.special_tokens.items()))
        parts = [self.kind.encode(), self._fingerprint_content(), specials.encode()]
        return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    @cached_property
    def special_names(self) -> dict[int, str]:
        """id -> text of the special tokens."""
        return {i: token for token, i in self.special_tokens.items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def _decode_stretches(self, ids: Sequence[int], skip_special: bool) -> Iterator[str]:
        stretch: list[int] = []
        for i in ids:
            name = self.special_names.get(i)
            known = name is not None or self._knows(i)
            if known and name is None:
                stretch.append(i)
                continue
            yield self._decode(stretch) if stretch else ""
            stretch = []
            yield "\ufffd" if name is None else "" if skip_special else name
        yield self._decode(stretch) if stretch else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self.special_tokens, self.bos, self.eos)

    def _fingerprint_content(self) -> bytes:
        return self.content

    @property
    def _base_size(self) -> int:
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) if text else [] for text in texts]

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _piece_id(self, token: str) -> int | None:
        raise NotImplementedError

    def _knows(self, token_id: int) -> bool:
        return 0 <= token_id < self._base_size


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model as it is, dummy prefix included; added tokens stand behind its last piece."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, special_tokens: dict[str, int], bos: str | None, eos: str | None) -> None:
        super().__init__(content, special_tokens, bos, eos)
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(content)

    @classmethod
    def from_files(cls, files: tokenizer_files.TokenizerFiles, added_tokens: tuple[str, ...]) -> SentencePieceTokenizer:
        vocabulary = tokenizer_files.read_sentencepiece(files)
        specials = vocabulary.with_added(added_tokens)
        content = vocabulary.escaping(specials)  # a user-defined piece that is special must not match in content
        tokenizer = cls(content, specials, None, None)
        tokenizer.bos = tokenizer._name_of(tokenizer._model.bos_id())
        tokenizer.eos = tokenizer._name_of(tokenizer._model.eos_id())
        return tokenizer

    def _name_of(self, token_id: int) -> str | None:
        return self.special_names.get(token_id)  # the library says -1 where the model has none

    @property
    def _base_size(self) -> int:
        return self._model.vocab_size()

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _piece_id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None


class TiktokenTokenizer(Tokenizer):
    """Llama 3: 128,000 byte-pair ranks and 256 special tokens behind them."""

    kind = "tiktoken"

    def __init__(self, content: bytes, special_tokens: dict[str, int], bos: str | None, eos: str | None) -> None:
        super().__init__(content, special_tokens, bos, eos)
        self.ranks = read_ranks(content)
        self._model = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=self.ranks, special_tokens={})

    @classmethod
    def from_files(cls, files: tokenizer_files.TokenizerFiles, added_tokens: tuple[str, ...]) -> TiktokenTokenizer:
        specials = tokenizer_files.llama3_specials(files, added_tokens)
        return cls(files.content, specials, "<|begin_of_text|>", "<|end_of_text|>")

    @property
    def _base_size(self) -> int:
        return len(self.ranks)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._model.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's regular expression overflows its stack at about a million blanks in a row, and panics
            if not _is_panic(error):
                raise
            raise DataError("the text holds a run of about a million blanks, which tiktoken cannot encode") from None

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _piece_id(self, token: str) -> int | None:
        return self.ranks.get(token.encode("utf-8"))


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library with its special tokens escaped in content."""

    kind = "json"

    def __init__(self, content: bytes, special_tokens: dict[str, int], bos: str | None, eos: str | None) -> None:
        super().__init__(content, special_tokens, bos, eos)
        self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._model.encode_special_tokens = True
        self._ids = set(self._model.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_files(cls, files: tokenizer_files.TokenizerFiles, added_tokens: tuple[str, ...]) -> JsonTokenizer:
        content, specials = tokenizer_files.read_json(files, added_tokens)
        names = tokenizer_files.json_names(files)
        for role, name in names.items():
            if name not in specials:
                raise ConfigError(f"{files.path}: the {role} token {name!r} is no special token of tokenizer.json")
        return cls(content, specials, names.get("bos"), names.get("eos"))

    @property
    def _base_size(self) -> int:
        return max(self._ids) + 1

    def _knows(self, token_id: int) -> bool:
        return token_id in self._ids

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)  # a third faster: no offsets
        return [encoding.ids if text else [] for text, encoding in zip(texts, encodings, strict=True)]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def _piece_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def _fingerprint_content(self) -> bytes:
        spec = json.loads(self._model.to_str())
        # the library's own spelling, without what never touches ids: the same before and after a re-export
        kept = {k: v for k, v in spec.items() if k not in ("post_processor", "decoder")}
        return json.dumps(kept, sort_keys=True).encode()


def _is_panic(error: BaseException) -> bool:
    """A failed assertion in a library written in Rust, which is no Exception and has no class to import."""
    return type(error).__name__ == "PanicException"


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a lone surrogate at character {error.start}; it is no valid Unicode text") from None


def read_ranks(content: bytes) -> dict[bytes, int]:
    """token -> rank of a tiktoken file: a base64 token and its rank on each line."""
    lines = (line.split() for line in content.splitlines() if line)
    return {binascii.a2b_base64(token): int(rank) for token, rank in lines}


_KINDS: dict[str, type[Tokenizer]] = {t.kind: t for t in (SentencePieceTokenizer, TiktokenTokenizer, JsonTokenizer)}
