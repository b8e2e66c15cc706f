"""Tokenizers of every kind: special tokens are text in content and live in prefixes, and what is saved is the same.

pytest tests/text/test_tokenizer.py
"""

import json
import pickle
import unicodedata

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.text import tokenizer as tokenizers
from ochat.text.tokenizer_convert import BOUNDARY
from tests import text_kit
from tests.text_kit import texts

EOT = "<|end_of_turn|>"
KINDS = ("llama", "gemma", "gpt2", "qwen", "mistral", "llama3")


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    if request.param in ("mistral", "llama3"):
        return text_kit.real_tokenizer(request.param)
    return text_kit.small_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokenizer(path):
    return tokenizers.load(path, (EOT,))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """A folder that the tokenizer was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    tokenizer.save(folder, chat_template=f"{{{{ '{BOUNDARY}' }}}}", eos_token=EOT)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def served(saved):
    """What transformers makes of it."""
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(saved)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(texts, max_size=4))
def test_specials_are_text_in_content_and_live_in_prefixes(tokenizer, parts):
    special = tokenizer.special_tokens[EOT]
    assert not set(tokenizer.encode(EOT.join(parts))) & set(tokenizer.special_tokens.values())
    clean = [p for p in parts if not any(token in p for token in tokenizer.special_tokens)]
    expected = [i for part in clean for i in [*tokenizer.encode(part), special]]
    assert tokenizer.encode_with_specials("".join(part + EOT for part in clean)) == expected


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decode_undoes_encode(tokenizer, text):
    normal = text if tokenizer.kind != "sentencepiece" else text.replace("\u2581", " ")  # which it writes for a blank
    if tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9"):
        normal = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normal
    assert tokenizer.decode([*ids, tokenizer.special_tokens[EOT], *ids]) == normal + normal
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == normal + "\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(texts, max_size=3))
def test_streamed_text_is_whole_characters_that_add_up(tokenizer, data, parts):
    """Of written text, and of ids as a model may say them, bytes of unfinished characters among them."""
    for text in ["".join(parts), "a\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467 \u6f22"]:
        ids = tokenizer.encode(text)
        streamed = list(tokenizer.decode_stream(ids))
        assert "".join(streamed) == tokenizer.decode(ids) and all(streamed)
        assert "\ufffd" in tokenizer.decode(ids) or not any("\ufffd" in part for part in streamed)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(ids), max_size=8))
    streamed = list(tokenizer.decode_stream(ids))
    # SentencePiece's decoder takes back the good letters of a run of bytes with a bad one: they were shown
    assert "".join(streamed) == tokenizer.decode(ids) or "\ufffd" in tokenizer.decode(ids)
    assert not any(part.endswith("\ufffd") for part in streamed[:-1])


@settings(max_examples=50, deadline=None)
@given(batch=st.lists(texts, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer, batch):
    batch = [*batch, "", EOT, "x" + EOT]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_added_tokens_get_the_next_free_ids(path, tokenizer):
    bare = tokenizers.load(path)
    assert EOT not in bare.special_tokens
    assert tokenizer.special_tokens[EOT] == bare.vocab_size == tokenizer.vocab_size - 1
    two = tokenizers.load(path, ("<new>", EOT, *list(bare.special_tokens)))
    assert two.special_tokens == bare.special_tokens | {"<new>": bare.vocab_size, EOT: bare.vocab_size + 1}
    assert len({bare.fingerprint(), tokenizer.fingerprint(), two.fingerprint()}) == 3
    with pytest.raises(ConfigError, match="an empty token"):
        tokenizers.load(path, ("",))


def test_lone_surrogates_are_refused(tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(DataError, match="lone surrogate at character 1"):
            encode("a\udc00")


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_transformers_gives_the_same_ids(tokenizer, served, text):
    """Special tokens are text if asked; by default they are live, and BOS comes first where the family has one."""
    assume(BOUNDARY not in text)  # which an export drops
    ids = tokenizer.encode(text)
    assert served(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
    if not any(token in text for token in tokenizer.special_tokens):
        expected = [*ids, tokenizer.special_tokens[EOT]]
        assert served(text + EOT, add_special_tokens=False)["input_ids"] == expected
        if tokenizer.kind != "json":  # a tokenizer.json keeps its own post-processor
            assert served(text + EOT)["input_ids"] == [tokenizer.bos_id, *expected]


def test_transformers_gives_the_same_names_and_texts(tokenizer, served):
    assert (served.bos_token_id, served.eos_token_id) == (tokenizer.bos_id, tokenizer.special_tokens[EOT])
    assert set(tokenizer.special_tokens) <= set(served.get_vocab())
    for text in text_kit.CORPUS[:4]:
        assert served.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_copy_is_the_same(tokenizer, saved):
    """Pickled, saved and loaded, or loaded from its tokenizer.json alone."""
    awkward = [*text_kit.NASTY, f"a{BOUNDARY}b"]
    pickled, again, alone = pickle.loads(pickle.dumps(tokenizer)), tokenizers.load(saved), saved / "tokenizer.json"
    for copy in (pickled, again, tokenizers.load(alone)):
        assert (copy.special_tokens, copy.bos_id) == (tokenizer.special_tokens, tokenizer.bos_id)
        assert copy.encode_batch(awkward) == tokenizer.encode_batch(awkward)
    assert pickled.fingerprint() == again.fingerprint() == tokenizer.fingerprint() and again.kind == tokenizer.kind
    assert pickled.eos_id == tokenizer.eos_id
    assert tokenizers.load(saved, ("<next>", EOT)).special_tokens["<next>"] == tokenizer.vocab_size


def test_the_end_of_turn_must_be_a_special_token(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no special token"):
        tokenizer.save(tmp_path / "out", chat_template="", eos_token="<no>")
