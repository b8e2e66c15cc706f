"""Read a Llama from a GGUF file: its configuration, its weights under Hugging Face names, and its tokenizer.

GGUF is llama.cpp's single-file format: quantised tensors plus metadata. Try it:
    ochat init-base --gguf model.gguf bases/mine
Relies on PyPI `gguf` (extra `data`) for the block formats. Only the `llama` architecture; everything that would change
the computation and is not read here is refused by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ochat.errors import CheckpointError, ConfigError

MAGIC = b"GGUF"
READ_KEYS = {
    "llama.block_count", "llama.context_length", "llama.embedding_length", "llama.feed_forward_length",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.key_length", "llama.attention.value_length", "llama.rope.freq_base",
    "llama.rope.dimension_count", "llama.vocab_size",
}  # fmt: skip
# GGUF's name of a tensor -> Hugging Face's; a block's names follow "blk.N." and "model.layers.N."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODEL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": HEAD,
}
BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# the format's token types that are matched before any splitting
CONTROL, USER_DEFINED = 3, 4


class GGUFFile:
    """An open GGUF file of the llama architecture; weights stay on disk until `read` asks for them.

    Raises ConfigError for another architecture or a missing `gguf` package, CheckpointError for a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        reader = _open(self.path)
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        _check_architecture(self.metadata, self.path)
        self._tensors = {hf_name(tensor.name, self.path): tensor for tensor in reader.tensors}

    def config(self) -> dict[str, Any]:
        """The Hugging Face `config.json` that says what this file's metadata say."""
        heads, hidden = self._value("llama.attention.head_count"), self._value("llama.embedding_length")
        head_dim = self.metadata.get("llama.attention.key_length", hidden // heads)
        for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if self.metadata.get(name, head_dim) != head_dim:
                raise ConfigError(f"{self.path}: {name} is {self.metadata[name]} but heads have {head_dim} dimensions: "
                                  f"partial rotary embedding and uneven value heads are not implemented")  # fmt: skip
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": int(self._tensor(EMBEDDING).shape[-1]),  # GGUF lists the fastest axis first
            "hidden_size": hidden,
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._value("llama.context_length"),
            "rms_norm_eps": _shortest(self._value("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self.metadata.get("llama.rope.freq_base", 10000.0)),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": HEAD not in self._tensors,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name: fp32, dequantised, rotary pairs of q and k back in halves."""
        from gguf import quants

        tensor, config = self._tensor(name), self.config()
        weight = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        projection = name.split(".")[-2]
        if projection in heads:
            weight = split_in_halves(weight, heads[projection])
        return torch.from_numpy(np.array(weight, copy=True))

    def location(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.path}: {name}"

    def tokenizer_json(self) -> dict[str, Any]:
        """A `tokenizer.json` (the `tokenizers` package's format) built from the metadata.

        Raises ConfigError for a tokenizer other than byte-level BPE with SmolLM's splitting: give one with --tokenizer.
        """
        model, splitting = (self.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if model != "gpt2" or splitting != "smollm":
            raise ConfigError(f"{self.path}: its tokenizer is {model!r} with the splitting {splitting!r}; only 'gpt2' "
                              f"(byte-level BPE) with 'smollm' is rebuilt from metadata: give the model's own "
                              f"tokenizer with --tokenizer PATH")  # fmt: skip
        tokens, types = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.token_type")
        merges = [merge.split(" ") for merge in self._value("tokenizer.ggml.merges")]
        return byte_level_bpe(tokens, types, merges)

    def special_token(self, role: str) -> str | None:
        """The text of the file's "bos" or "eos" token; None where it names none."""
        index = self.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else self._value("tokenizer.ggml.tokens")[index]

    def _value(self, key: str) -> Any:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the metadata lack {key}: convert the model again")
        return self.metadata[key]

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: {name} is missing: the file is not a whole model")
        return self._tensors[name]


def hf_name(name: str, path: Path) -> str:
    """Hugging Face's name of a GGUF tensor. Raises ConfigError for one that a plain Llama does not have."""
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}"
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    raise ConfigError(f"{path}: the tensor {name} is not part of a plain Llama and would change its computation; "
                      f"take the model's safetensors and `ochat init-base --hf` instead")  # fmt: skip


def split_in_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs in q and k. weight (heads * D, H): rows (x0, y0, x1, y1, ...) of a head
    become (x0, x1, ..., y0, y1, ...), where (x_i, y_i) are rotated together."""
    out, width = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def byte_level_bpe(tokens: list[str], types: list[int], merges: list[list[str]]) -> dict[str, Any]:
    """`tokenizer.json` of a byte-level BPE that takes digits one by one (SmolLM); control tokens become specials."""
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = enumerate(zip(tokens, types, strict=True))
    added = [{"id": index, "content": token, **flags, "special": kind == CONTROL}
             for index, (token, kind) in pieces if kind in (CONTROL, USER_DEFINED)]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --gguf wants a GGUF model file")
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path}: not a GGUF file (it does not start with {MAGIC.decode()!r})")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(f"reading GGUF needs PyPI `gguf`: pip install 'ochat-crlft[data]' ({error})") from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # what the reader raises on cut or damaged files
        raise CheckpointError(f"{path}: damaged or cut off ({error}): fetch the file again") from error


def _check_architecture(metadata: dict[str, Any], path: Path) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{path}: general.architecture is {architecture!r}; only 'llama' is implemented")
    for key, value in metadata.items():
        if key.startswith("llama.") and key not in READ_KEYS and value not in (0, "none", False):
            raise ConfigError(f"{path}: {key} = {value!r} would change the computation and is not implemented; "
                              f"take the model's safetensors and `ochat init-base --hf` instead")  # fmt: skip


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32: metadata store 1e-5 as 9.999999747e-06."""
    return float(str(np.float32(value)))
