"""Small exports of every family and template, made as users make them: init-base, prepare, train, export.

    folder = make(Path("work"), "qwen2", "openchat_3.6", "qwen")
Random models with real tokenizers, trained for two steps on two classes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers

from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.data.prepare import prepare
from ochat.export.hf_folder import export
from ochat.text import template as templates
from ochat.text import tokenizer_convert
from ochat.text.tokenizer import load as load_tokenizer
from tests import text_kit, tiny

SHAPE = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.1,
}  # fmt: skip
# PyPI `dashscope`, unpacked by `make test-servers`: the 151,643 ranks of every Qwen model up to 3
QWEN_RANKS = Path(__file__).parents[2] / ".cache/servers/tokenizers/dashscope/resources/qwen.tiktoken"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer_path(name: str, folder: Path) -> Path:
    """A real tokenizer; SmolLM2's and Qwen's are written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "smollm2":
        return text_kit.smollm2_tokenizer(folder)
    return qwen_tokenizer(folder) if name == "qwen" else text_kit.real_tokenizer(name)


def qwen_tokenizer(folder: Path) -> Path:
    """Qwen 2's and 3's tokenizer, of the published ranks and pattern."""
    if not QWEN_RANKS.is_file():
        pytest.skip(f"the real Qwen ranks are not at {QWEN_RANKS}; `make test-servers` puts them there")
    bpe = tokenizer_convert._tiktoken_bpe(QWEN_RANKS.read_bytes())
    bpe.ignore_merges = False
    model = tokenizers.Tokenizer(bpe)
    model.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in QWEN_TOKENS])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    return folder


def make(folder: Path, family: str, template: str, tokenizer: str) -> Path:
    """The exported folder, in float32."""
    path = tokenizer_path(tokenizer, folder / "tokenizer")
    needed = templates.load(template)
    names = (needed.eot, *needed.special_tokens)
    vocabulary = load_tokenizer(path, names)
    model = SHAPE | {"model_type": family, "vocab_size": vocabulary.vocab_size, "bos_token_id": vocabulary.bos_id}
    # vLLM loads a Gemma as all are published, with one matrix for embedding and head
    model |= {"tie_word_embeddings": tokenizer == "qwen" or family.startswith("gemma")}
    (folder / "model.json").write_text(json.dumps(model))
    base = folder / "base"
    init_base.main(InitBaseOptions(base, random=folder / "model.json", tokenizer=path, add_token=names))
    source = tiny.write_lines(folder / "conversations.jsonl", tiny.conversations())
    prepare([source], base, template, folder / "data", progress=False)
    config = folder / "config.toml"
    config.write_text(tiny.TOML.format(base=json.dumps(str(base)), data=json.dumps(str(folder / "data"))))
    world = tiny.World(folder, base, folder / "data", config)
    tiny.train(world, folder / "run", "--data.max_steps=2", "--data.token_budget=256")
    export(folder / "run", folder / "exported", dtype="float32")
    return folder / "exported"
