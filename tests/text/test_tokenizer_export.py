"""Exported tokenizers: transformers sees training's ids for any text, and the folder loads back as the same tokenizer.

pytest tests/text/test_tokenizer_export.py
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError
from ochat.text import sentencepiece_model as spm
from ochat.text import tokenizer as tokenizers
from ochat.text import tokenizer_export
from ochat.text.tokenizer_files import BOUNDARY
from tests import text_kit

EOT = "<|end_of_turn|>"
KINDS = ("llama", "gemma", "gpt2", "qwen", "mistral", "llama3")
runs = st.lists(
    st.sampled_from([" ", "  ", "a", "=", "-", "\n", "the", "1", "\u2581", "\u00e9", "<h1>"]), max_size=30
).map("".join)
texts = st.text() | runs | st.sampled_from(text_kit.NASTY) | st.lists(st.sampled_from(text_kit.NASTY)).map("".join)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A tokenizer and what transformers makes of its export."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    real = request.param in ("mistral", "llama3")
    path = text_kit.real_tokenizer(request.param) if real else text_kit.small_folder(request.param, folder / "base")
    tokenizer = tokenizers.load(path, (EOT,))
    tokenizer_export.export(tokenizer, folder / "out", chat_template=f"{{{{ '{BOUNDARY}' }}}}", eos_token=EOT)
    (folder / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tokenizer, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_ids_equal_in_transformers(pair, text):
    tokenizer, served, _ = pair
    assert served(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_special_tokens_and_bos_in_transformers(pair, text):
    """By default special tokens in the text are live, and BOS stands in front where the family has one."""
    tokenizer, served, _ = pair
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if not any(token in text for token in tokenizer.special_tokens):
        expected = [*tokenizer.encode(text), tokenizer.special_tokens[EOT]]
        assert served(text + EOT, add_special_tokens=False)["input_ids"] == expected
        if tokenizer.kind != "json":  # a tokenizer.json keeps its own post-processor
            assert served(text + EOT)["input_ids"] == bos + expected


def test_words_that_are_tokens_stay_whole(pair):
    """Some of Llama 3's tokens cannot be reached by merges; tiktoken takes such a word as one token nevertheless."""
    tokenizer, served, _ = pair
    for text in ("しない", "ーカー", " 스타", "데이트"):
        assert served(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert tokenizer.kind != "tiktoken" or len(tokenizer.encode(text)) == 1


def test_names(pair):
    tokenizer, served, _ = pair
    assert (served.bos_token_id, served.eos_token_id) == (tokenizer.bos_id, tokenizer.special_tokens[EOT])
    assert set(tokenizer.special_tokens) <= set(served.get_vocab())


def test_reload_gives_the_same_tokenizer(pair):
    tokenizer, _, folder = pair
    again = tokenizers.load(folder)
    assert (again.kind, again.special_tokens) == (tokenizer.kind, tokenizer.special_tokens)
    assert again.fingerprint() == tokenizer.fingerprint() and again.bos_id == tokenizer.bos_id
    awkward = [*text_kit.NASTY, f"a{BOUNDARY}b"]
    assert all(again.encode(text) == tokenizer.encode(text) for text in awkward)


def test_reloaded_added_tokens_go_on_counting(pair):
    tokenizer, _, folder = pair
    assert tokenizers.load(folder, ("<next>", EOT)).special_tokens["<next>"] == tokenizer.vocab_size


def test_decode_equals_transformers(pair):
    tokenizer, served, _ = pair
    for text in text_kit.CORPUS[:4]:
        assert served.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def _varied(change: str) -> bytes:
    """The Llama-like model with a switch turned, by the bytes of its normaliser or a piece type."""
    content = text_kit.sentencepiece_bytes(dummy_prefix=True)
    return spm.with_types(content, {419: spm.UNUSED if change == "unused" else spm.USER_DEFINED})


@pytest.mark.parametrize(
    ("change", "message"), [("unused", "unused pieces"), ("user", "user-defined pieces and a dummy prefix")]
)
def test_what_cannot_be_exact_is_refused(tmp_path, change, message):
    (tmp_path / "tokenizer.model").write_bytes(_varied(change))
    with pytest.raises(ConfigError, match=message):
        tokenizer_export.export(tokenizers.load(tmp_path), tmp_path / "out", chat_template="", eos_token="</s>")


def test_eos_must_exist(tmp_path):
    tokenizer = tokenizers.load(text_kit.small_folder("llama", tmp_path))
    with pytest.raises(ConfigError, match="no special token"):
        tokenizer_export.export(tokenizer, tmp_path / "out", chat_template="", eos_token=EOT)
