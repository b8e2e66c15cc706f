"""Read a Llama from a GGUF file: its configuration, its weights under Hugging Face names, and its tokenizer.

GGUF is llama.cpp's single-file format: quantised tensors plus metadata. Try it:
    ochat init-base --gguf model.gguf bases/mine
Relies on PyPI `gguf` (extra `data`) for the block formats. Only the `llama` architecture; everything that would change
the computation and is not read here is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ochat.errors import CheckpointError, ConfigError
from ochat.files import model_folder
from ochat.model import hf
from ochat.model.config import ModelConfig

# of config.json -> of the metadata
REQUIRED_KEYS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
OPTIONAL_KEYS = {
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
HEAD_DIM_KEYS = ("llama.rope.dimension_count", "llama.attention.value_length")  # where they are there, they are equal
# the format's token types that are matched before any splitting
CONTROL, USER_DEFINED = 3, 4


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of an open file; as a string, file and Hugging Face's name for messages."""

    path: Path
    name: str
    heads: int | None  # of q and k, whose rotary pairs llama.cpp interleaves
    _tensor: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def read(self) -> torch.Tensor:
        """fp32, dequantised, rotary pairs of q and k back in halves."""
        from gguf import quants

        weight = np.asarray(quants.dequantize(self._tensor.data, self._tensor.tensor_type), dtype=np.float32)
        weight = weight if self.heads is None else split_in_halves(weight, self.heads)
        return torch.from_numpy(np.array(weight, copy=True))


class GGUFFile:
    """An open GGUF file of the llama architecture: `config`, and its `tensors` by Hugging Face's names.

    Raises: ConfigError for another architecture or a missing `gguf` package, CheckpointError for a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        reader = _open(self.path)
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        _check_architecture(self.metadata, self.path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config(stored)
        self.tensors = self._tensors(stored)

    def _config(self, stored: dict[str, Any]) -> ModelConfig:
        if "token_embd.weight" not in stored:
            raise CheckpointError(f"{self.path}: {hf.EMBEDDING} is missing: the file is not a whole model")
        found = {key: self._value(name) for key, name in REQUIRED_KEYS.items()}
        found |= {key: self.metadata.get(name) for key, name in OPTIONAL_KEYS.items()}
        record = {key: _shortest(value) if isinstance(value, float) else value for key, value in found.items()}
        record |= {
            "model_type": "llama",
            "vocab_size": int(stored["token_embd.weight"].shape[-1]),  # GGUF lists the fastest axis first
            "tie_word_embeddings": "output.weight" not in stored,
            "dtype": "bfloat16",
        }
        config = ModelConfig.from_hf(record, str(self.path))
        for name in HEAD_DIM_KEYS:
            if self.metadata.get(name, config.head_dim) != config.head_dim:
                raise ConfigError(
                    f"{self.path}: {name} is {self.metadata[name]} but heads have {config.head_dim} dimensions: "
                    f"partial rotary embedding and uneven value heads are not implemented"
                )
        return config

    def _tensors(self, stored: dict[str, Any]) -> dict[str, GGUFTensor]:
        from gguf import MODEL_ARCH, get_tensor_name_map

        heads, found = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}, {}
        names = get_tensor_name_map(MODEL_ARCH.LLAMA, self.config.num_layers)
        for part in (part for parts in hf.parameter_parts(self.config).values() for part in parts):
            name = names.get_name(part.name, try_suffixes=(".weight",))
            if name not in stored:
                raise CheckpointError(f"{self.path}: {part.name} is missing: the file is not a whole model")
            found[part.name] = GGUFTensor(self.path, part.name, heads.get(part.name.split(".")[-2]), stored.pop(name))
        for name in stored:
            raise ConfigError(
                f"{self.path}: the tensor {name} is not part of a plain Llama and would change its computation; "
                f"take the model's safetensors and `ochat init-base --hf` instead"
            )
        return found

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
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(f"reading GGUF needs PyPI `gguf`: pip install 'ochat-crlft[data]' ({error})") from error
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. {model_folder.how_to_get_base(path)}")
    model_folder.refuse_pointer(path)
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:  # what the reader raises on cut or damaged files
        raise CheckpointError(f"{path}: damaged, cut off or no GGUF file ({error}); fetch it again") from error


def _check_architecture(metadata: dict[str, Any], path: Path) -> None:
    if (parts := metadata.get("split.count", 1)) > 1:  # all but the first have no other key
        join = "`llama-gguf-split --merge FIRST_PART WHOLE.gguf` (of llama.cpp)"
        raise ConfigError(f"{path}: one of {parts} parts; join them with {join}")
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: general.architecture is {architecture!r}; only 'llama' is read from GGUF; "
            f"take the model's safetensors and `ochat init-base --hf`"
        )
    known = {*REQUIRED_KEYS.values(), *OPTIONAL_KEYS.values(), *HEAD_DIM_KEYS, "llama.vocab_size"}
    for key, value in metadata.items():
        if key.startswith("llama.") and key not in known and value not in (0, "none", False):
            raise ConfigError(f"{path}: {key} = {value!r} would change the computation and is not implemented; "
                              f"take the model's safetensors and `ochat init-base --hf` instead")  # fmt: skip


def _shortest(value: float) -> float:
    """The shortest decimal of an fp32: metadata store 1e-5 as 9.999999747e-06."""
    return float(str(np.float32(value)))
