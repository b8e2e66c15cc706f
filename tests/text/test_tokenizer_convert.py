"""Converted tokenizers give the ids of the libraries they come from, for any text; what cannot be exact is refused.

pytest tests/text/test_tokenizer_convert.py
"""

import binascii

import pytest
import sentencepiece
import tiktoken
from hypothesis import example, given, settings

from ochat.errors import ConfigError
from ochat.text import sentencepiece_model
from ochat.text import tokenizer as tokenizers
from ochat.text.tokenizer_convert import LLAMA3_PATTERN
from tests import text_kit
from tests.text_kit import texts


def sentencepiece_encode(content: bytes):
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(content)
    return model.encode


def tiktoken_encode(content: bytes):
    lines = (line.split() for line in content.splitlines())
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("x", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary


@pytest.fixture(scope="module", params=["llama", "gemma", "mistral", "llama3"])
def pair(request, tmp_path_factory):
    """The tokenizer's `encode` and the library's."""
    if request.param in ("mistral", "llama3"):
        path = text_kit.real_tokenizer(request.param)
    else:
        path = text_kit.small_folder(request.param, tmp_path_factory.mktemp("small")) / "tokenizer.model"
    library = tiktoken_encode if request.param == "llama3" else sentencepiece_encode
    return tokenizers.load(path).encode, library(path.read_bytes())


@settings(max_examples=300, deadline=None)
@given(text=texts)
@example("しない")  # a token of Llama 3's to which no merges lead; tiktoken takes the word as one nevertheless
@example("ーカー")
@example(" 스타")
def test_ids_are_the_librarys(pair, text):
    """Apart from a turn mark that the model lists as a symbol: in content it is text."""
    ours, librarys = pair
    if "_of_turn>" not in text:
        assert ours(text) == librarys(text)


def test_long_runs():
    """tiktoken panics at about a million blanks."""
    tokenizer = tokenizers.load(text_kit.real_tokenizer("llama3"))
    ids = tokenizer.encode(" " * 1_500_000 + "x")
    assert tokenizer.decode(ids) == " " * 1_500_000 + "x"


def test_real_families_have_their_known_ids():
    mistral = tokenizers.load(text_kit.real_tokenizer("mistral"), ("<|end_of_turn|>",))
    ids = (mistral.bos_id, mistral.eos_id, mistral.special_tokens["<|end_of_turn|>"], mistral.vocab_size)
    assert ids == (1, 2, 32000, 32001)
    assert mistral.model.token_to_id("\u2581the") == 272 and mistral.model.token_to_id("not a piece") is None
    llama3 = tokenizers.load(text_kit.real_tokenizer("llama3"))
    known = {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007}
    assert (known | {"<|eot_id|>": 128009}).items() <= llama3.special_tokens.items()
    assert (len(llama3.special_tokens), llama3.vocab_size, llama3.bos_id) == (256, 128256, 128000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_defined_symbols": ["<h1>"]}, "user-defined pieces and a dummy prefix"),
        ({"model_type": "unigram", "vocab_size": 320}, "no BPE model"),
        ({"normalization_rule_name": "nfkc"}, "normalises characters"),
        ({"remove_extra_whitespaces": True}, "removes extra blanks"),
        ({"treat_whitespace_as_suffix": True}, "blanks as suffixes"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, change, message):
    (tmp_path / "tokenizer.model").write_bytes(text_kit.sentencepiece_bytes(dummy_prefix=True, **change))
    with pytest.raises(ConfigError, match=rf"tokenizer\.model: .* {message}; give"):
        tokenizers.load(tmp_path)


def test_the_model_reader_agrees_with_the_library():
    content = text_kit.sentencepiece_bytes(dummy_prefix=False)
    model, library = sentencepiece_model.parse(content), sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(content)
    pieces = [(p.text, p.score, p.type == sentencepiece_model.BYTE) for p in model.pieces]
    ids = range(library.vocab_size())
    assert pieces == [(library.id_to_piece(i), library.get_score(i), library.is_byte(i)) for i in ids]
    assert (model.add_dummy_prefix, model.byte_fallback, model.model_type) == (False, True, sentencepiece_model.BPE)
    assert (model.pieces[library.bos_id()].text, model.pieces[library.eos_id()].text) == (model.bos, model.eos)
    with pytest.raises(ValueError, match="cut off"):
        sentencepiece_model.parse(content[: len(content) // 2 + 1])
