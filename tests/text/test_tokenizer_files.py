"""Which files of a folder are its tokenizer, what the others add to it, and what is refused.

pytest tests/text/test_tokenizer_files.py
"""

import base64
import json
import logging
import shutil

import pytest

from ochat.errors import ConfigError
from ochat.text import sentencepiece_model
from ochat.text import tokenizer as tokenizers
from ochat.text.tokenizer_bounds import check_steps
from tests import text_kit

EOT = "<|end_of_turn|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: text_kit.small_folder(kind, base / kind) for kind in ("llama", "gpt2")}


@pytest.fixture
def spec(folders):
    """A tokenizer.json."""
    return json.loads((folders["gpt2"] / "tokenizer.json").read_text())


@pytest.fixture
def model_folder(tmp_path, folders):
    """A folder with a SentencePiece model alone."""
    shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path


def entry(content: str, token_id: int) -> dict:
    return {"id": token_id, "content": content, "special": True}


def test_kind_is_known_by_content(tmp_path, folders):
    shutil.copy(folders["gpt2"] / "tokenizer.json", tmp_path / "tokenizer.model")
    assert tokenizers.load(tmp_path / "tokenizer.model").kind == "json"
    shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / "anything.bin")
    assert tokenizers.load(tmp_path / "anything.bin").kind == "sentencepiece"


@pytest.mark.parametrize("other", ["bpe", "words", "unigram"])
def test_sentencepiece_wins_over_a_json_of_another_vocabulary(model_folder, spec, other, caplog):
    """Whose tokens would otherwise take ids of the pieces, or get ids far above them."""
    alone = tokenizers.load(model_folder, (EOT,))
    words = {f"word{i}": i for i in range(5000)}
    specs = {
        "bpe": spec,
        "words": {"model": {"vocab": words}, "added_tokens": [entry("[UNK]", 2), entry("[PAD]", 5000)]},
        "unigram": {"model": {"vocab": [[word, -1.0] for word in words]}, "added_tokens": [entry("[PAD]", 5000)]},
    }
    (model_folder / "tokenizer.json").write_text(json.dumps(specs[other]))
    with caplog.at_level(logging.WARNING):
        tokenizer = tokenizers.load(model_folder, (EOT,))
    assert "tokenizer.json is no conversion" in caplog.text
    assert tokenizer.kind == "sentencepiece" and tokenizer.special_tokens == alone.special_tokens


@pytest.mark.parametrize("vocabulary", [None, dict, lambda ids: [[piece, 0.0] for piece in ids]])
def test_other_files_add_their_tokens_to_a_sentencepiece_model(model_folder, vocabulary):
    """A tokenizer.json without a vocabulary or with the pieces' own, as a BPE's or a unigram model's."""
    model = sentencepiece_model.parse((model_folder / "tokenizer.model").read_bytes())
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    spec = {"model": {"vocab": vocabulary(ids)} if vocabulary else {}, "added_tokens": [entry("<extra>", 420)]}
    (model_folder / "tokenizer.json").write_text(json.dumps(spec))
    (model_folder / "added_tokens.json").write_text('{"<more>": 421}')
    tokenizer = tokenizers.load(model_folder, (EOT,))
    assert tokenizer.kind == "sentencepiece" and len(ids) == 420
    assert [tokenizer.model.token_to_id(t) for t in ("<extra>", "<more>", EOT)] == [420, 421, 422]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_id_that_leaves_a_gap_is_refused(tmp_path, folders, kind):
    shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_text('{"<far>": 425}')
    with pytest.raises(ConfigError, match="cannot give '<far>' the id 425"):
        tokenizers.load(tmp_path)


def test_json_cuts_nothing_and_keeps_no_blank_for_a_special(tmp_path, folders, spec):
    """A file may ask for truncation, padding and stripped blanks: none of it touches training's ids."""
    plain = tokenizers.load(folders["gpt2"])
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    spec["added_tokens"][1] |= {"rstrip": True, "normalized": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    odd = tokenizers.load(tmp_path / "tokenizer.json")
    assert all(odd.encode(text) == plain.encode(text) for text in text_kit.NASTY)


def test_a_live_ordinary_token_becomes_special_when_named(tmp_path, spec):
    spec["added_tokens"][2]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loose, strict = tokenizers.load(tmp_path), tokenizers.load(tmp_path, ("<|im_end|>",))
    assert loose.encode("<|im_end|>") == [2] and "<|im_end|>" not in loose.special_tokens
    assert 2 not in strict.encode("<|im_end|>") and strict.special_tokens["<|im_end|>"] == 2


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
FAR = {"model": BPE, "added_tokens": [{"content": "<x>", "id": 10**15}]}
OTHER_SCHEMAS = [
    {"model": {}},
    {"model": {"type": "BPE"}},
    {"model": {"type": "BPE", "vocab": 3}},
    {"model": {"type": "Nonsense", "vocab": {}}},
    {"model": BPE | {"vocab": {"a": -1}}},
    {"model": BPE | {"merges": [["a", "b"]]}},
    {"model": BPE, "added_tokens": [{}]},
    {"model": BPE, "added_tokens": {"a": 1}},
    {"model": BPE, "post_processor": {"single": 3}},
    {"model": BPE, "pre_tokenizer": {"pretokenizers": [3]}},
]


def replaced(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


def chain(*steps, key="normalizers"):
    return {"type": "Sequence", key: list(steps)}


def charsmap(*texts):
    """A SentencePiece map of characters that writes these texts; its trie is left out."""
    data = (0).to_bytes(4, "little") + b"\0".join(texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


GROWS, LONGER = replaced("e" * 5, String="e"), "makes text up to .* times longer"
EMPTY = ({"String": ""}, {"Regex": ""})
OUT_OF_PROPORTION = [
    ({"normalizer": chain(GROWS, chain(*[GROWS] * 3))}, r"normalizer makes text up to 6e\+02 times longer"),
    ({"normalizer": chain(*[replaced("x", Regex="(?=e)")] * 30)}, LONGER),
    ({"normalizer": replaced("\U0001d538" * 5, String="e")}, LONGER),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, LONGER),
    ({"normalizer": charsmap(b"a", b"b" * 10**6)}, LONGER),
    ({"normalizer": chain(*[{"type": "NFKC"}, GROWS] * 2)}, LONGER),
    ({"decoder": chain(*[GROWS] * 9, key="decoders")}, "its decoder " + LONGER),
    *(({"normalizer": replaced("x", **empty)}, "normalizer has an empty pattern") for empty in EMPTY),
    *(({"decoder": replaced("x", **empty)}, "decoder has an empty pattern") for empty in EMPTY),
    *(
        (
            {"pre_tokenizer": {"type": "Split", "pattern": empty, "behavior": "Isolated", "invert": False}},
            "empty pattern",
        )
        for empty in EMPTY
    ),
    ({"model": {"vocab": {"zz": 10**9}}}, "an id of 1,000,000,000, for which .* only 340 tokens"),
    ({"model": {"vocab": {"zz": 2**20}}}, "an id of 1,048,576, for which"),
]


@pytest.mark.parametrize(("change", "message"), OUT_OF_PROPORTION, ids=range(len(OUT_OF_PROPORTION)))
def test_a_file_out_of_proportion_is_refused_before_it_is_used(tmp_path, spec, change, message):
    """One line, not gigabytes: ids far beyond the tokens, and steps that multiply text again and again."""
    if "model" in change:
        change = {"model": spec["model"] | {"vocab": spec["model"]["vocab"] | change["model"]["vocab"]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
    with pytest.raises(ConfigError, match=message):
        tokenizers.load(tmp_path)


NORMALIZERS = [  # Llama 2 and Phi 3, Gemma, Qwen, CLIP, ALBERT, T5 and XLM-R (whose map has nmt_nfkc's longest text)
    chain({"type": "Prepend", "prepend": "▁"}, replaced("▁", String=" ")), replaced("▁", String=" "), {"type": "NFC"},
    chain({"type": "NFC"}, replaced(" ", Regex=r"\s+"), {"type": "Lowercase"}),
    chain(replaced('"', String="``"), replaced('"', String="''"), {"type": "NFKD"}, {"type": "StripAccents"}),
    chain({"type": "NFKC"}, {"type": "Strip", "strip_left": True, "strip_right": True}, replaced("▁", Regex=" {2,}")),
    chain(replaced(" ", Regex=r"\n+"), replaced(" ", Regex=r"\t"), replaced(" ", Regex=" {2,}")),
]  # fmt: skip


@pytest.mark.parametrize("normalizer", NORMALIZERS, ids=range(len(NORMALIZERS)))
def test_what_real_tokenizers_write_is_read(tmp_path, spec, normalizer):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": normalizer}))
    assert tokenizers.load(tmp_path).encode("e")
    check_steps({"normalizer": charsmap("\ufdfa".encode() * 11, b"a")}, tmp_path)


def test_a_pattern_that_takes_forever_is_an_error_of_the_tokenizer(tmp_path, spec):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"pre_tokenizer": split}))
    tokenizer, text = tokenizers.load(tmp_path), "a" * 40 + "b"
    for encode in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode_batch([text]),
        lambda: tokenizer.encode_with_offsets([text], specials=False),
    ):
        with pytest.raises(ConfigError, match="cannot encode this text"):
            encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *(("tokenizer.json", json.dumps(each).encode(), "damaged, or of another schema") for each in OTHER_SCHEMAS),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer.model", b"\x0a\xff\xff", "is no SentencePiece model"),
        ("tokenizer.model", b"", "is no SentencePiece model"),
        ("tokenizer.json", b'{"vocab": []}', "no `model` section"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", json.dumps(FAR).encode(), "has the id 10{15}; at most"),
        ("x.tiktoken", b"IQ== 0\nIg== 1\n", "2 tiktoken ranks, but only Llama 3's"),
        ("vocab.txt", b"a", "no tokenizer.model, .* in the folder"),
    ],
)
def test_faulty_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tokenizers.load(tmp_path, (EOT,))


def test_missing_and_doubtful_folders(tmp_path, folders):
    with pytest.raises(ConfigError, match="no such file or folder"):
        tokenizers.load("meta-llama/Llama-2-7b")
    for name in ("a.model", "b.model"):
        shutil.copy(folders["llama"] / "tokenizer.model", tmp_path / name)
    with pytest.raises(ConfigError, match="several sentencepiece files"):
        tokenizers.load(tmp_path)
    (tmp_path / "b.model").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<x>": 420}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"421": {"content": "<x>"}}}')
    with pytest.raises(ConfigError, match="'<x>' has id 421 in one file and 420 in another"):
        tokenizers.load(tmp_path)
