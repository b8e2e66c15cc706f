"""The model configuration: read from and written to a Hugging Face `config.json`; parameter and FLOP counts.

    config = ModelConfig.load("path/to/base");  config.num_parameters()
The families of families.py. A setting that would change the computation and is not implemented is refused by name: a
model trained with ignored settings would be silently wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

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
    """One decoder: blocks of attention and a gated MLP. Letters of the repository: H, F, L, N, K, D, V.

    What is not given is as Llama has it.
    """

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
    local_rope: RopeConfig | None = None  # of layers with a window, where theirs differs
    rope_layers: tuple[bool, ...] = ()  # per layer, whether q and k are rotated; empty: all
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"  # of the gate: SwiGLU or GeGLU
    norm_placement: Literal["before", "after", "both"] = "before"  # of a norm and each branch of a block
    norm_offset: float = 0.0  # a norm scales by offset + weight
    qk_norm: Literal["", "head", "full"] = ""  # of each head of q and k, or of all heads together
    windows: tuple[int | None, ...] = ()  # per layer, how many keys a token sees (itself included); empty: all
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of a branch's output, before it is added
    logits_scale: float = 1.0  # of the last norm's output, in front of the head
    attention_scale: float | None = None  # of q k^T; None: 1 / sqrt(D)
    attention_softcap: float = 0.0  # q k^T becomes cap * tanh(q k^T / cap); 0: off
    logit_softcap: float = 0.0
    fused_files: bool = False  # files hold q, k, v as one tensor, and gate and up as one
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    dtype: str = field(default="float32", compare=False)  # in which the weights are stored; no part of the computation
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # the keys that were read

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
        families.check(fields, family)
        return cls._read(fields, family)

    @classmethod
    def _read(cls, fields: Fields, family: Family) -> ModelConfig:
        record = fields.record
        sizes, keys = families.sizes(fields, family), families.read_keys(family)
        default = family.attention_bias
        attention_bias = default is not None and fields.flag("attention_bias", default)
        own_out_bias = family.out_bias_key != "attention_bias"
        read_rope = functools.partial(rope_settings.from_hf, record, fields.where, is_partial=family.rotates_partly)
        layers = ("full_attention", "sliding_attention") if family.local_theta else (None, None)
        base = read_rope(family.theta, layers[0])
        local = read_rope(family.local_theta, layers[1]) if family.local_theta else None
        config = cls(
            model_type=record["model_type"],
            **sizes,
            **families.scalars(fields, sizes["hidden_size"]),
            norm_eps=fields.number("rms_norm_eps", family.norm_eps),
            max_position_embeddings=fields.integer("max_position_embeddings", family.max_position_embeddings),
            tie_embeddings=fields.flag("tie_word_embeddings", family.ties_embeddings),
            rope=base,
            local_rope=local,
            rope_layers=families.rope_layers(fields, family, sizes["num_layers"]),
            qkv_bias=family.qkv_bias or attention_bias,
            out_bias=fields.flag(family.out_bias_key, False) if own_out_bias else attention_bias,
            mlp_bias=family.reads_mlp_bias and fields.flag("mlp_bias", False),
            activation="silu" if family.activations == ("silu",) else "gelu_tanh",
            norm_placement=family.norm_placement,
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            windows=families.windows(fields, family, sizes["num_layers"]),
            fused_files=family.fused_files,
            bos_token_id=fields.integer("bos_token_id", None, least=0),
            eos_token_ids=_eos_token_ids(fields),
            pad_token_id=fields.integer("pad_token_id", None, least=-1),
            initializer_range=fields.number("initializer_range", 0.02),
            dtype=str(record.get("dtype") or record.get("torch_dtype") or "float32").removeprefix("torch."),
            source={key: value for key, value in record.items() if key in keys},
        )
        _check_heads(config, fields)
        return config

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5 load: the keys that were read, in the old spelling, which both know.

        Raises: ConfigError for a configuration, changed in code, that its model type cannot express.
        """
        family = FAMILIES[self.model_type]
        generic: dict[str, Any] = {
            **{key: getattr(self, ours) for ours, (key, _) in families.SIZES.items()},
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_dropout": 0.0,
            "initializer_range": self.initializer_range,
        }
        if family.attention_bias is not None:
            generic["attention_bias"] = self.qkv_bias
        if family.reads_mlp_bias:
            generic["mlp_bias"] = self.mlp_bias
        newer = {"dtype", "rope_parameters"}  # spelled below as older versions do
        rope = rope_settings.to_hf(self.rope, self.local_rope)
        known = {key: value for key, value in self.source.items() if key not in newer}
        record = (
            _windows_to_hf(self, family)
            | generic
            | known
            | {
                "architectures": [family.architecture],
                "model_type": self.model_type,
                "vocab_size": self.vocab_size,
                family.activation_key: family.activations[0],  # Gemma's "gelu" is another one in some versions
                **{key: value for key, value in rope.items() if key in families.read_keys(family)},
                "bos_token_id": self.bos_token_id,
                "eos_token_id": self.eos_token_ids[0]
                if len(self.eos_token_ids) == 1
                else list(self.eos_token_ids) or None,
                "pad_token_id": self.pad_token_id,
                "use_cache": True,
                "torch_dtype": self.dtype,
            }
        )
        if ModelConfig._read(Fields(record, "config.json"), family) != self:
            raise ConfigError(f"config.json of a {self.model_type} model cannot express all of {self}")
        return record

    def window(self, layer: int) -> int | None:
        """How many keys a token of this layer sees, itself included; None: all before it."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotation of this layer's q and k; None: none."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope

    def matmul_params(self) -> int:
        """Weights of the blocks' matrix products: q, k, v, out, gate, up, down; neither embeddings nor head."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def head_params(self) -> int:
        """Weights of the product with the vocabulary, shared with the embeddings or not."""
        return self.vocab_size * self.hidden_size

    def block_norm_params(self) -> int:
        """Numbers in the norms of one block."""
        qk_norms = {"": 0, "head": 2, "full": self.num_heads + self.num_kv_heads}[self.qk_norm] * self.head_dim
        return self.hidden_size * (4 if self.norm_placement == "both" else 2) + qk_norms

    def num_parameters(self) -> int:
        """All trainable numbers; tied embeddings count once."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        biases = qkv * self.qkv_bias + self.hidden_size * self.out_bias
        biases += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        embeddings = self.head_params() * (1 if self.tie_embeddings else 2)
        return (
            self.matmul_params() + self.num_layers * (biases + self.block_norm_params()) + self.hidden_size + embeddings
        )

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


def settings(config: Any) -> dict[str, Any]:
    """The fields of a ModelConfig that distinguish its computation, as JSON: none at its default, so that a field of a
    later version changes nothing for the models of today."""
    found = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.compare and value != each.default:
            found[each.name] = settings(value) if is_dataclass(value) else value
    return found


def _check_heads(config: ModelConfig, fields: Fields) -> None:
    heads, hidden, head_dim = config.num_heads, config.hidden_size, config.head_dim
    if heads % config.num_kv_heads:
        raise fields.fail("num_attention_heads", f" = {heads} is no multiple of {config.num_kv_heads} kv heads")
    if head_dim % 2:
        raise fields.fail("head_dim", f" = {head_dim} is odd; rotary embedding needs pairs")
    if fields.record.get("head_dim") is None and FAMILIES[config.model_type].head_dim is None and hidden % heads:
        raise fields.fail("hidden_size", f" = {hidden} is no multiple of {heads} heads")


def _windows_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of a configuration that was made in code."""
    window = next((size for size in config.windows if size), None)
    if family.windows in ("none", "all"):
        return {"sliding_window": window} if family.windows == "all" else {}
    types = ["sliding_attention" if size else "full_attention" for size in config.windows]
    record = {"sliding_window": window} | ({"layer_types": types} if types else {})
    if family.switches_windows:
        record["use_sliding_window"] = window is not None
    if family.windows == "upper":
        first = next((layer for layer, size in enumerate(config.windows) if size), config.num_layers)
        record["max_window_layers"] = first
    return record


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    found = fields.value("eos_token_id", [])
    ids = found if isinstance(found, list) else [found]
    return tuple(Fields({"eos_token_id": token}, fields.where).integer("eos_token_id", least=0) for token in ids)
