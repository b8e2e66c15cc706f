"""The model configuration: read from and written to a Hugging Face `config.json`; parameter and FLOP counts.

    config = ModelConfig.load("path/to/base");  config.num_parameters()
Llama 1/2/3/3.1/3.2, Mistral, Qwen2 and Qwen3. A setting that would change the computation and is not implemented is
refused by name: a model trained with ignored settings would be silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.errors import ConfigError
from ochat.files import bounded_json, model_folder
from ochat.files.bounded_json import Fields
from ochat.model import families
from ochat.model import rope as rope_settings
from ochat.model.families import FAMILIES, Family
from ochat.model.rope import RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """One decoder: pre-norm blocks of rotary attention and SwiGLU. Letters of the repository: H, F, L, N, K, D, V."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # H
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # D
    norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()  # per layer, how many keys a token sees (itself included); empty: all
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    dtype: str = field(default="float32", compare=False)  # in which the weights are stored; no part of the computation

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Read `directory/config.json`. Raises: ConfigError where it is missing, no JSON, or not implemented."""
        path = Path(directory) / "config.json"
        if model_folder.has_only_gguf(path.parent):  # its config.json, if any, has no sizes
            raise ConfigError(f"{directory} has no safetensors. {model_folder.how_to_get_base(directory)}")
        try:
            record = bounded_json.read_object(path, ConfigError, "fetch it again")
        except FileNotFoundError:
            problem = f"{path.absolute()} does not exist"
            raise ConfigError(f"{problem}. {model_folder.how_to_get_base(directory)}") from None
        return cls.from_hf(record, str(path))

    @classmethod
    def from_hf(cls, record: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The config of one JSON object, in the old spelling or that of transformers 5; of a multimodal model the text
        model's. Raises: ConfigError."""
        record = families.text_record(record)
        fields = Fields(record, where)
        family = families.find(fields)
        families.refuse_unimplemented(fields, family)
        sizes = families.sizes(fields, family)
        attention_bias = fields.flag("attention_bias", False) and family.reads_attention_bias
        config = cls(
            model_type=record["model_type"],
            **sizes,
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings", family.max_position_embeddings),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            rope=rope_settings.from_hf(record, where),
            qkv_bias=family.qkv_bias or attention_bias,
            out_bias=attention_bias,
            mlp_bias=fields.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            windows=families.windows(fields, family, sizes["num_layers"]),
            bos_token_id=fields.integer("bos_token_id", None, least=0),
            eos_token_ids=_eos_token_ids(fields),
            pad_token_id=fields.integer("pad_token_id", None, least=-1),
            initializer_range=fields.number("initializer_range", 0.02),
            dtype=str(record.get("dtype") or record.get("torch_dtype") or "float32").removeprefix("torch."),
        )
        _check_heads(config, fields)
        return config

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 load: the old spelling, which both know."""
        family = FAMILIES[self.model_type]
        record: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            **{key: getattr(self, ours) for ours, (key, _) in families.SIZES.items()},
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
            **rope_settings.to_hf(self.rope),
            "attention_dropout": 0.0,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            "torch_dtype": self.dtype,
        }
        if family.reads_attention_bias:
            record["attention_bias"] = self.out_bias
        if family.reads_mlp_bias:
            record["mlp_bias"] = self.mlp_bias
        return record | _windows_to_hf(self, family)

    def window(self, layer: int) -> int | None:
        """How many keys a token of this layer sees, itself included; None: all before it."""
        return self.windows[layer] if self.windows else None

    def matmul_params(self) -> int:
        """Weights of the blocks' matrix products: q, k, v, out, gate, up, down; neither embeddings nor head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def head_params(self) -> int:
        """Weights of the product with the vocabulary, shared with the embeddings or not."""
        return self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """All trainable numbers; tied embeddings count once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases = qkv * self.qkv_bias + self.hidden_size * self.out_bias
        biases += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        embeddings = self.head_params() * (1 if self.tie_embeddings else 2)
        return self.matmul_params() + self.num_layers * (biases + norms) + self.hidden_size + embeddings

    def flops_per_step(self, num_tokens: int, sum_len_sq: int, num_supervised: int) -> float:
        """Model FLOPs of forward and backward over packed documents, the work a perfect implementation must do.

        A weight costs 2 FLOPs a token forward and 4 backward: 6 * matmul_params * T; the head's only for supervised
        rows. Causal attention does q k^T and p v over len^2 / 2 pairs, N * D wide, 2 FLOPs each: 2 * N * D * len^2
        forward and twice that backward: 6 * L * N * D * sum(len^2). Recompute, norms and the embedding's look-up are
        never counted; what the last block is spared for rows that are not supervised is counted as if done; a sliding
        window is not taken off, so for documents longer than one the figure is an upper bound.
        """
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * sum_len_sq
        return float(6 * self.matmul_params() * num_tokens + 6 * self.head_params() * num_supervised + attention)

    def flops_per_sequence(self, lengths: NDArray, num_supervised: NDArray) -> NDArray[np.float64]:
        """(S,): flops_per_step of each sequence alone, by its length and its supervised tokens."""
        flops = self.flops_per_step(0, 1, 0) * lengths.astype(np.float64)  # in place: a data set has many sequences
        flops += self.flops_per_step(1, 0, 0)
        flops *= lengths
        flops += self.flops_per_step(0, 0, 1) * num_supervised
        return flops


def _check_heads(config: ModelConfig, fields: Fields) -> None:
    heads, hidden, head_dim = config.num_heads, config.hidden_size, config.head_dim
    if heads % config.num_kv_heads:
        raise fields.fail("num_attention_heads", f" = {heads} is no multiple of {config.num_kv_heads} kv heads")
    if head_dim % 2:
        raise fields.fail("head_dim", f" = {head_dim} is odd; rotary embedding needs pairs")
    if fields.record.get("head_dim") is None and FAMILIES[config.model_type].head_dim is None and hidden % heads:
        raise fields.fail("hidden_size", f" = {hidden} is no multiple of {heads} heads")


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family is FAMILIES["llama"]:
        return {}
    window = next((size for size in config.windows if size), None)
    if not family.reads_layer_types:
        return {"sliding_window": window}
    first = next((layer for layer, size in enumerate(config.windows) if size), config.num_layers)
    record = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": first}
    types = ["sliding_attention" if size else "full_attention" for size in config.windows]
    return record | ({"layer_types": types} if types else {})


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    found = fields.value("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    return tuple(Fields({"eos_token_id": token}, fields.where).integer("eos_token_id", least=0) for token in ids)
