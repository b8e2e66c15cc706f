"""A GGUF file gives back the Llama it was written from; everything that is not read is refused by name.

The files are written here with the `gguf` package as llama.cpp's converter does it, rotary pairs interleaved.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.gguf import GGUFFile

gguf = pytest.importorskip("gguf", reason="PyPI `gguf` (extra `data`) is not installed")

LETTERS = [chr(ord("a") + i) for i in range(26)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, *"0123456789", "Ġ", "th", "the", "12"]
TYPES = [3, 3, 3, *[1] * (len(TOKENS) - 3)]
MERGES = ["t h", "th e", "1 2"]
CONFIG = ModelConfig(
    "llama", len(TOKENS), 64, 96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, norm_eps=1e-5,
    max_position_embeddings=128, tie_embeddings=True,
)  # fmt: skip


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary pairs: the halves (x.., y..) of each head become x0, y0, x1, y1, ..."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def random_state(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    parts = [part for parts in hf.parameter_parts(config).values() for part in parts]
    return {part.name: rng.normal(size=part.shape).astype(np.float32) for part in parts}


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def write(
    path: Path,
    config: ModelConfig = CONFIG,
    state: dict[str, np.ndarray] | None = None,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantise: bool = False,
    extra_keys: dict[str, float] | None = None,
    extra_tensors: tuple[str, ...] = (),
    leave_out: tuple[str, ...] = (),
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": config.num_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (extra_keys or {}).items():
        writer.add_float32(key, value)
    for name, weight in (random_state(config) if state is None else state).items():
        if name in leave_out:
            continue
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        weight = interleaved(weight, heads) if heads else weight
        if quantise and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), weight)
    for name in extra_tensors:
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("tied", "quantise"), [(True, False), (False, False), (True, True)])
def test_weights_and_config_come_back(tmp_path, tied, quantise):
    config = replace(CONFIG, tie_embeddings=tied)
    state = random_state(config)
    file = GGUFFile(write(tmp_path / "m.gguf", config, state, quantise=quantise))
    assert file.config == replace(config, bos_token_id=1, eos_token_ids=(2,))
    for name, weight in state.items():
        # Q8_0 rounds to 1/127 of a block's largest magnitude: at most half of that, plus the fp16 of the scale
        bound = np.abs(weight).max() * (0.5 / 127 + 2**-10) if quantise else 0.0
        assert (file.tensors[name].read() - torch.from_numpy(weight)).abs().max() <= bound, name


def test_tokenizer_follows_the_metadata(tmp_path):
    file = GGUFFile(write(tmp_path / "m.gguf"))
    built = Tokenizer.from_str(json.dumps(file.tokenizer_json()))
    assert built.encode("the 12<|im_end|>").tokens == ["the", "Ġ", "1", "2", "<|im_end|>"]
    assert built.decode(built.encode("the the").ids) == "the the"
    assert (file.special_token("bos"), file.special_token("eos")) == ("<|im_start|>", "<|im_end|>")
    with pytest.raises(ConfigError, match="'llama-bpe'.*--tokenizer"):
        GGUFFile(write(tmp_path / "m.gguf", pre="llama-bpe")).tokenizer_json()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architecture": "qwen2"}, "'qwen2'; only 'llama' is read from GGUF; take the model's safetensors"),
        ({"extra_keys": {"split.count": 3}}, "one of 3.0 parts; join them with `llama-gguf-split --merge"),
        ({"extra_keys": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor"),
        ({"extra_keys": {"llama.expert_count": 8.0}}, "llama.expert_count"),
        ({"extra_keys": {"llama.rope.dimension_count": 8.0}}, "llama.rope.dimension_count"),
        ({"extra_tensors": ("rope_freqs.weight",)}, "rope_freqs.weight"),
        ({"extra_tensors": ("blk.0.attn_q.bias",)}, "blk.0.attn_q.bias"),
    ],
)
def test_what_would_change_the_computation_is_refused(tmp_path, change, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        GGUFFile(write(tmp_path / "m.gguf", **change))


def test_damaged_files_are_named(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    for content in (whole[: len(whole) // 2], whole[:40], b"hello", b""):
        (tmp_path / "damaged.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged.gguf: damaged"):
            GGUFFile(tmp_path / "damaged.gguf")
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=f"m.gguf: a Git LFS pointer.*`git -C {tmp_path} lfs pull`"):
        GGUFFile(tmp_path / "m.gguf")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            GGUFFile(write(tmp_path / "less.gguf", leave_out=(name,)))
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")
