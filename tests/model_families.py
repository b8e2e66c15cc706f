"""Small random models of every family, made and saved by transformers: the peer that ours must equal.

peer = make("mistral", tmp_path);  ours = hf.load(tmp_path, dtype="float32")
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ochat.model import hf
from ochat.model.config import ModelConfig

VOCAB_SIZE = 97
BASE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # the pairs of 16 dimensions lie in all three bands
}  # fmt: skip
QWEN_MIXED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "use_sliding_window": True,
    "sliding_window": 3, "attention_bias": True, "head_dim": 8,
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {  # of a part of each head: 3 pairs
    "rope_type": "longrope", "type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.2, 3.0, 7.0],
}  # fmt: skip
SMOLLM3_WINDOWS = {
    "use_sliding_window": True, "sliding_window": 4, "no_rope_layers": [1, 0, 1], "pad_token_id": 0,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4, "logits_scaling": 3.0,
}  # fmt: skip
GEMMA = {"head_dim": 12, "num_key_value_heads": 1}
GEMMA2 = GEMMA | {
    "sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
}  # fmt: skip
GEMMA3 = GEMMA | {
    "sliding_window": 5, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPE,
}  # fmt: skip
FAMILIES = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 16}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-tied-odd-head": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-mixed": ("Qwen3", QWEN_MIXED),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "phi3-longrope": ("Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "pad_token_id": 0}),
    "phi3": ("Phi3", {"sliding_window": 5, "pad_token_id": 0}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "smollm3-windows": ("SmolLM3", SMOLLM3_WINDOWS),
    "granite": ("Granite", GRANITE),
    "seed-oss": ("SeedOss", {"head_dim": 12, "pad_token_id": 0}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma3": ("Gemma3Text", GEMMA3),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "olmo3": ("Olmo3", {"sliding_window": 4, "num_hidden_layers": 4, "pad_token_id": 0}),
}


def config(family: str) -> transformers.PreTrainedConfig:
    """transformers' configuration of one of FAMILIES."""
    name, options = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**BASE | options)


def make(family: str, folder: Path, seed: int = 0) -> transformers.PreTrainedModel:
    """The peer, fp32, saved in `folder`. Biases and norms are random too: at 0 and 1 a lost one would not show."""
    torch.manual_seed(seed)
    peer = transformers.AutoModelForCausalLM.from_config(config(family)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0.0, 0.3)
            if parameter.dim() == 1:
                parameter.add_(1.0)
    peer.save_pretrained(folder)
    return peer


def random_ids(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Id lists of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def peer_logits(peer: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(len, V) of one sequence alone."""
    return peer(torch.tensor([ids])).logits[0]


def to_hf(config: ModelConfig, named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Our (name, tensor) pairs, split into Hugging Face's; the results are views."""
    parts, state = hf.parameter_parts(config), {}
    for name, whole in named_tensors:
        pieces = whole.split([part.shape[0] for part in parts[name]])
        state |= {part.name: piece for part, piece in zip(parts[name], pieces, strict=True)}
    return state


def from_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors, fused into our parameters."""
    return {ours: torch.cat([state[part.name] for part in parts]) for ours, parts in hf.parameter_parts(config).items()}
