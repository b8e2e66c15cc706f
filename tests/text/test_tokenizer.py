"""Tokenizers: equal to the libraries they stand for; special tokens are text in content and live in prefixes.

pytest tests/text/test_tokenizer.py
"""

import json
import pickle
import shutil
import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.text import sentencepiece_model
from ochat.text import tokenizer as tokenizers
from tests import text_kit

EOT = "<|end_of_turn|>"
KINDS = ("llama", "gemma", "gpt2", "qwen")
texts = st.text() | st.sampled_from(text_kit.NASTY) | st.lists(st.sampled_from(text_kit.NASTY)).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: text_kit.small_folder(kind, base / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def small(folders):
    return {kind: tokenizers.load(folder, (EOT,)) for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_equal_to_sentencepiece(small, kind, text):
    """Apart from a turn mark that the model lists as a symbol: in content it is text."""
    library = sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(text_kit.sentencepiece_bytes(dummy_prefix=kind == "llama"))
    if "_of_turn>" not in text:
        assert small[kind].encode(text) == library.encode(text)


@pytest.fixture(scope="module")
def llama3():
    return tokenizers.load(text_kit.real_tokenizer("llama3"))


@pytest.fixture(scope="module")
def llama3_library(llama3):
    ranks = tokenizers.read_ranks(llama3.content)
    return tiktoken.Encoding("x", pat_str=tokenizers.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_equal_to_tiktoken(llama3, llama3_library, text):
    assert llama3.encode(text) == llama3_library.encode_ordinary(text)


def test_a_run_that_tiktoken_cannot_encode_is_refused(llama3):
    """The library panics there, which no caller could catch as an ordinary error."""
    with pytest.raises(DataError, match="a run of about a million blanks"):
        llama3.encode(" " * 3_000_000)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(texts, max_size=4))
def test_specials_are_text_in_content_and_live_in_prefixes(small, kind, parts):
    tokenizer = small[kind]
    special = tokenizer.special_tokens[EOT]
    text = EOT.join(parts)
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())
    clean = [p for p in parts if not any(token in p for token in tokenizer.special_tokens)]
    expected = [i for part in clean for i in [*tokenizer.encode(part), special]]
    assert tokenizer.encode_with_specials("".join(part + EOT for part in clean)) == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decode_undoes_encode(small, kind, text):
    tokenizer = small[kind]
    normal = text if tokenizer.kind == "json" else text.replace("\u2581", " ")  # SentencePiece writes a blank for it
    if kind == "qwen":
        normal = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normal
    assert tokenizer.decode([*ids, tokenizer.special_tokens[EOT]], skip_special=False) == normal + EOT
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == normal + "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_get_the_next_free_ids(small, folders, kind):
    bare, one = tokenizers.load(folders[kind]), small[kind]
    assert bare.token_id(EOT) is None
    assert one.token_id(EOT) == one.special_tokens[EOT] == bare.vocab_size == one.vocab_size - 1
    two = tokenizers.load(folders[kind], ("<new>", EOT, *list(bare.special_tokens)))
    assert two.special_tokens == bare.special_tokens | {"<new>": bare.vocab_size, EOT: bare.vocab_size + 1}
    assert len({bare.fingerprint(), one.fingerprint(), two.fingerprint()}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_keeps_everything(small, kind):
    again = pickle.loads(pickle.dumps(small[kind]))
    assert again.fingerprint() == small[kind].fingerprint()
    assert (again.bos_id, again.eos_id, again.vocab_size) == (
        small[kind].bos_id,
        small[kind].eos_id,
        small[kind].vocab_size,
    )
    assert all(again.encode(text) == small[kind].encode(text) for text in text_kit.NASTY)


def test_real_families_have_their_known_ids(llama3):
    mistral = tokenizers.load(text_kit.real_tokenizer("mistral"), (EOT,))
    assert (mistral.bos_id, mistral.eos_id, mistral.token_id(EOT), mistral.vocab_size) == (1, 2, 32000, 32001)
    assert mistral.token_id("\u2581the") == 272 and mistral.token_id("not a piece") is None
    known = {
        "<|begin_of_text|>": 128000,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
    }
    assert known.items() <= llama3.special_tokens.items()
    assert (len(llama3.special_tokens), llama3.vocab_size, llama3.bos_id) == (256, 128256, 128000)


def test_kind_is_told_by_content(tmp_path, folders):
    shutil.copy(folders["gpt2"] / "tokenizer.json", tmp_path / "tokenizer.model")
    assert tokenizers.load(tmp_path / "tokenizer.model").kind == "json"
    shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / "anything.bin")
    assert tokenizers.load(tmp_path / "anything.bin").kind == "sentencepiece"


def test_sentencepiece_wins_in_a_folder_with_both(tmp_path, folders):
    for kind in ("llama", "gpt2"):
        shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": [_entry("<extra>", 420)]}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text('{"<more>": 421}')
    tokenizer = tokenizers.load(tmp_path, (EOT,))
    assert tokenizer.kind == "sentencepiece"
    assert [tokenizer.token_id(t) for t in ("<extra>", "<more>", EOT)] == [420, 421, 422]


@pytest.mark.parametrize("other", ["bpe", "words", "unigram"])
def test_sentencepiece_wins_over_a_json_of_another_vocabulary(tmp_path, folders, other):
    """Whose tokens would otherwise take ids of the pieces, or stand far behind them."""
    shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / "tokenizer.model")
    alone = tokenizers.load(tmp_path, (EOT,))
    words = {f"word{i}": i for i in range(5000)}
    specs = {
        "bpe": json.loads((folders["gpt2"] / "tokenizer.json").read_text()),
        "words": {"model": {"vocab": words}, "added_tokens": [_entry("[UNK]", 2), _entry("[PAD]", 5000)]},
        "unigram": {"model": {"vocab": [[word, -1.0] for word in words]}, "added_tokens": [_entry("[PAD]", 5000)]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(specs[other]))
    with pytest.warns(UserWarning, match="tokenizer.json is no conversion"):
        tokenizer = tokenizers.load(tmp_path, (EOT,))
    assert tokenizer.kind == "sentencepiece" and tokenizer.special_tokens == alone.special_tokens


@pytest.mark.parametrize("is_unigram", [False, True])
def test_a_json_of_the_pieces_own_vocabulary_adds_its_tokens(tmp_path, folders, is_unigram):
    shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / "tokenizer.model")
    pieces = [piece.text for piece in sentencepiece_model.read((tmp_path / "tokenizer.model").read_bytes()).pieces]
    vocab = [[piece, 0.0] for piece in pieces] if is_unigram else {piece: i for i, piece in enumerate(pieces)}
    spec = {"model": {"vocab": vocab}, "added_tokens": [_entry("<extra>", len(pieces))]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = tokenizers.load(tmp_path, (EOT,))
    assert [tokenizer.token_id(t) for t in ("<extra>", EOT)] == [len(pieces), len(pieces) + 1]


def _entry(content: str, token_id: int) -> dict:
    return {"id": token_id, "content": content, "special": True}


def test_json_cuts_nothing_and_keeps_no_blank_for_a_special(tmp_path, folders):
    """A file may ask for truncation, padding and stripped blanks: none of it touches training's ids."""
    spec = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    plain = tokenizers.load(folders["gpt2"])
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["added_tokens"][1] |= {"rstrip": True, "normalized": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    odd = tokenizers.load(tmp_path / "tokenizer.json")
    assert all(odd.encode(text) == plain.encode(text) for text in text_kit.NASTY)


def test_a_live_ordinary_token_becomes_special_when_named(tmp_path, folders):
    spec = json.loads((folders["gpt2"] / "tokenizer.json").read_text())
    spec["added_tokens"][2]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loose, strict = tokenizers.load(tmp_path), tokenizers.load(tmp_path, ("<|im_end|>",))
    assert loose.encode("<|im_end|>") == [2] and "<|im_end|>" not in loose.special_tokens
    assert 2 not in strict.encode("<|im_end|>") and strict.special_tokens["<|im_end|>"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer.model", b"\x0a\xff\xff", "is no SentencePiece model"),
        ("tokenizer.model", b"", "is no SentencePiece model"),
        ("tokenizer.json", b'{"vocab": []}', "no `model` section"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("x.tiktoken", b"IQ== 0\nIg== 1\n", "2 tiktoken ranks"),
        ("vocab.txt", b"a", "no tokenizer.model, .* in the folder"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tokenizers.load(tmp_path)


def test_missing_and_doubtful_folders(tmp_path, folders):
    with pytest.raises(ConfigError, match="no such file or folder"):
        tokenizers.load("meta-llama/Llama-2-7b")
    for name in ("a.model", "b.model"):
        shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / name)
    with pytest.raises(ConfigError, match="several sentencepiece files"):
        tokenizers.load(tmp_path)
    for name, i in (("added_tokens.json", 420), ("tokenizer_config.json", 421)):
        value = {"<x>": i} if i == 420 else {"added_tokens_decoder": {i: {"content": "<x>"}}}
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "b.model").unlink()
    with pytest.raises(ConfigError, match="'<x>' has id 421 in one file and 420 in another"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_refused(small, kind):
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        small[kind].encode("a\udc00")


def test_the_model_reader_agrees_with_the_library():
    content = text_kit.sentencepiece_bytes(dummy_prefix=False)
    model, library = sentencepiece_model.read(content), sentencepiece.SentencePieceProcessor()
    library.LoadFromSerializedProto(content)
    assert [p.text for p in model.pieces] == [library.id_to_piece(i) for i in range(library.vocab_size())]
    assert [p.score for p in model.pieces] == [library.get_score(i) for i in range(library.vocab_size())]
    assert [p.type == sentencepiece_model.BYTE for p in model.pieces] == [
        library.is_byte(i) for i in range(len(model.pieces))
    ]
    assert (model.add_dummy_prefix, model.byte_fallback, model.model_type) == (False, True, sentencepiece_model.BPE)
    patched = sentencepiece_model.read(sentencepiece_model.with_types(content, {5: 3, 300: 3}))
    changed = [i for i, (a, b) in enumerate(zip(model.pieces, patched.pieces, strict=True)) if a != b]
    assert changed == [5, 300] and patched.pieces[300].score == model.pieces[300].score
    with pytest.raises(ValueError, match="cut off"):
        sentencepiece_model.read(content[: len(content) // 2 + 1])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(batch=st.lists(texts, max_size=5))
def test_a_batch_is_its_texts_one_by_one(small, kind, batch):
    batch = [*batch, "", EOT, "x" + EOT]
    assert small[kind].encode_batch(batch) == [small[kind].encode(text) for text in batch]


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_batch_is_its_texts_one_by_one_with_real_tokenizers(name):
    tokenizer = tokenizers.load(text_kit.real_tokenizer(name))
    assert tokenizer.encode_batch(text_kit.NASTY) == [tokenizer.encode(text) for text in text_kit.NASTY]


def test_a_batch_with_a_lone_surrogate_is_refused(small):
    with pytest.raises(DataError, match="lone surrogate at character 1"):
        small["gpt2"].encode_batch(["fine", "a\ud800"])


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_ids_are_those_of_live_text_however_many_there_are(small, kind, monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_PREFIXES", 3)
    prefixes = [f"class {i} User:{EOT}" for i in range(5)] * 2
    assert [list(small[kind].prefix_ids(p)) for p in prefixes] == [
        small[kind].encode_with_specials(p) for p in prefixes
    ]
