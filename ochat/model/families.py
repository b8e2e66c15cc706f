"""Model families: what each fixes, which keys of a `config.json` it reads, and which settings are refused.

    fields = Fields(json.load(open("config.json")), "config.json");  family = find(fields);  check(fields, family)
Defaults and special rules are those of transformers' classes, so a missing key means the same model in both, and a key
that the class never reads is only warned of.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ochat.files.bounded_json import REQUIRED, Fields, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What a model type fixes, or assumes where a key is missing (the values of transformers)."""

    architecture: str
    max_position_embeddings: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    norm_eps: float = 1e-6
    theta: float = 10000.0  # rope_theta
    local_theta: float | None = None  # of layers with a window, where these have a rotation of their own
    ties_embeddings: bool = False
    infers_kv_heads: bool = False  # a missing num_key_value_heads: as many as heads
    activations: tuple[str, ...] = ("silu",)  # spellings of the one it has
    activation_key: str = "hidden_act"
    norm_offset: float = 0.0
    norm_placement: Literal["before", "after", "both"] = "before"
    qk_norm: Literal["", "head", "full"] = ""
    fused_files: bool = False
    qkv_bias: bool = False
    attention_bias: bool | None = None  # where attention_bias is missing; None: the key is not read
    out_bias_key: str = "attention_bias"
    reads_mlp_bias: bool = False
    # which layers have a window where layer_types is missing: none, all, those from max_window_layers on, those
    # without rotation, or all but every n-th
    windows: Literal["none", "all", "upper", "unrotated"] | int = "none"
    window: int | None = None  # a missing sliding_window
    switches_windows: bool = False  # reads use_sliding_window, by default false
    rotates_partly: bool = False  # reads partial_rotary_factor
    keys: tuple[str, ...] = ()  # further ones that it reads


LLAMA = Family("LlamaForCausalLM", 2048, attention_bias=False, reads_mlp_bias=True, infers_kv_heads=True)
QWEN2 = Family("Qwen2ForCausalLM", 32768, qkv_bias=True, windows="upper", window=4096, switches_windows=True)
GEMMA = Family(
    "GemmaForCausalLM",
    8192,
    head_dim=256,
    ties_embeddings=True,
    activations=("gelu_pytorch_tanh", "gelu"),
    norm_offset=1.0,
    attention_bias=False,
    keys=("use_bidirectional_attention",),
)
GEMMA2 = replace(
    GEMMA,
    architecture="Gemma2ForCausalLM",
    activations=("gelu_pytorch_tanh",),
    activation_key="hidden_activation",
    norm_placement="both",
    windows=2,
    window=4096,
    keys=(*GEMMA.keys, "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"),
)
OLMO2 = Family(
    "Olmo2ForCausalLM",
    2048,
    norm_eps=1e-5,
    infers_kv_heads=True,
    norm_placement="after",
    qk_norm="full",
    attention_bias=False,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": Family("MistralForCausalLM", 131072, windows="all", window=4096),
    "qwen2": QWEN2,
    "qwen3": replace(
        QWEN2, architecture="Qwen3ForCausalLM", head_dim=128, qk_norm="head", qkv_bias=False, attention_bias=False
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        4096,
        norm_eps=1e-5,
        infers_kv_heads=True,
        fused_files=True,
        windows="all",
        rotates_partly=True,
        keys=("resid_pdrop", "embd_pdrop"),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        32768,
        theta=2000000.0,
        ties_embeddings=True,
        attention_bias=False,
        reads_mlp_bias=True,
        windows="unrotated",
        switches_windows=True,
        keys=("no_rope_layers", "no_rope_layer_interval"),
    ),
    "granite": replace(
        LLAMA,
        architecture="GraniteForCausalLM",
        keys=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        524288,
        head_dim=128,
        attention_bias=True,
        out_bias_key="attention_out_bias",
        reads_mlp_bias=True,
        keys=("attention_out_bias", "residual_dropout"),
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": replace(
        GEMMA2,
        architecture="Gemma3ForCausalLM",
        max_position_embeddings=131072,
        theta=1000000.0,
        local_theta=10000.0,
        qk_norm="head",
        windows=6,
        keys=(*GEMMA2.keys, "sliding_window_pattern", "rope_local_base_freq"),
    ),
    "olmo2": OLMO2,
    "olmo3": replace(
        OLMO2, architecture="Olmo3ForCausalLM", theta=500000.0, local_theta=500000.0, windows=4, window=4096
    ),
}


# Multimodal model types, of which the text model is read: their class, and what it assumes of the text model.
WRAPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3_text", "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration", {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip
IMAGE_KEYS = frozenset(
    """vision_config image_token_index image_token_id boi_token_index boi_token_id eoi_token_index eoi_token_id
    mm_tokens_per_image multimodal_projector_bias projector_hidden_act spatial_merge_size
    vision_feature_layer""".split()  # noqa: SIM905
)

# our name -> key, and several times what the largest published models have
SIZES = {
    "vocab_size": ("vocab_size", 1 << 24),
    "hidden_size": ("hidden_size", 1 << 19),
    "intermediate_size": ("intermediate_size", 1 << 22),
    "num_layers": ("num_hidden_layers", 1 << 12),
    "num_heads": ("num_attention_heads", 1 << 14),
    "num_kv_heads": ("num_key_value_heads", 1 << 14),
    "head_dim": ("head_dim", 1 << 14),
}
QUANTISED = ": the weights are quantised; take the unquantised base"
REFUSED = {
    "quantization_config": QUANTISED,
    "quantization": QUANTISED,  # of MLX
    "compression_config": QUANTISED,  # of compressed-tensors before it was quantization_config
    "use_bidirectional_attention": ": only causal attention is implemented",
}
DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")
COMMON_KEYS = frozenset(
    """model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings attention_dropout rope_theta
    rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings layer_types bos_token_id
    eos_token_id pad_token_id initializer_range dtype torch_dtype is_causal""".split()  # noqa: SIM905 (reads better than a list of literals)
)
# Bookkeeping, and defaults of generation that old versions wrote into config.json: no logit depends on them.
HARMLESS_KEYS = frozenset(
    """_name_or_path name_or_path transformers_version transformers.js_config use_cache return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores id2label label2id problem_type
    num_labels _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _commit_hash
    license language tags max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    num_return_sequences temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids begin_suppress_tokens suppress_tokens
    forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values
    decoder_start_token_id sep_token_id prefix task_specific_params finetuning_task cache_implementation
    tokenizer_class auto_map pretraining_tp chunk_size_feed_forward is_decoder is_encoder_decoder hidden_act
    _sliding_window_pattern max_window_layers""".split()  # noqa: SIM905
)
# Read by makers' code or by old versions; at this value they say what our model does anyway
NEUTRAL = {"full_attn_mod": 1, "interpolate_factor": 1, "hidden_activation": "gelu_pytorch_tanh"}
# Kinds of models that are not implemented, and keys by which they are known
KINDS = {
    "mixture-of-experts": frozenset(
        """num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok""".split()  # noqa: SIM905
    ),
    "multimodal": frozenset(
        """vision_config audio_config text_config thinker_config visual img_processor audio_processor mm_vision_tower
        image_token_id image_token_index""".split()  # noqa: SIM905
    ),
    "linear-attention or state-space": frozenset(
        """mamba_d_state mamba_d_ssm mamba_d_conv state_size ssm_state_size linear_num_key_heads linear_conv_kernel_dim
        hybrid_override_pattern layers_block_type lru_width""".split()  # noqa: SIM905
    ),
    "encoder-decoder": frozenset(["is_encoder_decoder"]),
}


def is_multimodal(record: Mapping[str, Any]) -> bool:
    """Whether a config is that of a multimodal model, of which the text model can be read."""
    model_type = record.get("model_type")
    return isinstance(model_type, str) and model_type in WRAPPERS and isinstance(record.get("text_config"), dict)


def text_record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: of a multimodal config a part, of others all.

    What text_config leaves out stands around it, or is the class's default. Of tie_word_embeddings and the ids of
    begin, end and padding what stands around it counts, as in transformers 5.
    """
    if not is_multimodal(record):
        return record
    architecture, defaults = WRAPPERS[record["model_type"]]
    around = {k: v for k, v in record.items() if k not in IMAGE_KEYS | {"text_config", "model_type"} and v is not None}
    if _names(around.get("architectures"), architecture):
        del around["architectures"]
    inner = {key: value for key, value in record["text_config"].items() if key != "architectures"}
    first = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return defaults | around | inner | {key: around[key] for key in first if key in around}


def find(fields: Fields) -> Family:
    """The family of a config's model_type, its architecture checked. Raises: ConfigError."""
    model_type = fields.value("model_type", REQUIRED)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        kinds = ", ".join(_kinds(fields.record))
        kind = f" ({kinds} model)" if kinds else ""
        raise fields.fail("model_type", f" is {shown(model_type)}{kind}: not implemented ({', '.join(FAMILIES)} are)")
    family = FAMILIES[model_type]
    found = fields.record.get("architectures") or [family.architecture]
    if not _names(found, family.architecture):
        raise fields.fail("architectures", f" is {shown(found)}; expected [{family.architecture!r}] for {model_type!r}")
    return family


def _names(architectures: Any, expected: str) -> bool:
    """Whether `architectures` is the one class expected, with FSDP in front where a sharded model was saved, or in the
    first Llama's spelling, LLaMAForCausalLM."""
    names = architectures if isinstance(architectures, list) else []
    return [str(name).removeprefix("FSDP").lower() for name in names] == [expected.lower()]


def _kinds(record: Mapping[str, Any]) -> list[str]:
    """What kinds of an unknown model its keys, or those of its text model, tell."""
    inner = record.get("text_config")
    parts = [part for part in (record, inner) if isinstance(part, Mapping)]
    # a dense model may have one expert
    keys = {key for part in parts for key, value in part.items() if value and (value is True or value != 1)}
    return [kind for kind, marks in KINDS.items() if keys & marks]


def read_keys(family: Family) -> frozenset[str]:
    """The keys on which the model of a family, or its training, depends."""
    optional = {
        "attention_bias": family.attention_bias is not None,
        "mlp_bias": family.reads_mlp_bias,
        "sliding_window": family.windows != "none",
        "max_window_layers": family.windows == "upper",
        "use_sliding_window": family.switches_windows,
    }
    read = (key for key, is_read in optional.items() if is_read)
    return COMMON_KEYS.union(read, family.keys, [family.activation_key])


def check(fields: Fields, family: Family) -> None:
    """Warns of settings without effect. Raises: ConfigError for one that changes a logit and is not implemented."""
    record = fields.record
    for key, problem in REFUSED.items():
        if record.get(key):
            raise fields.fail(key, f" = {shown(record[key])}{problem}")
    if record.get("is_causal") is False:
        raise fields.fail("is_causal", " is false; only causal attention is implemented")
    activation = record.get(family.activation_key) or family.activations[0]
    if activation not in family.activations:
        raise fields.fail(
            family.activation_key, f" is {shown(activation)}; only {family.activations[0]!r} is implemented"
        )
    _check_own_code(fields, family)
    dropouts = [key for key in DROPOUTS if record.get(key)]
    if dropouts:
        warn_once(f"{fields.where}: {', '.join(dropouts)}: no dropout is applied in training")
    unknown = record.keys() - read_keys(family) - HARMLESS_KEYS
    unread = sorted(key for key in unknown if record[key] and record[key] != NEUTRAL.get(key))
    if unread and record.get("auto_map"):
        raise fields.fail(unread[0], f" = {shown(record[unread[0]])}: may be read by the model's own code (auto_map)")
    if unread:
        warn_once(f"{fields.where}: {family.architecture} reads no {', '.join(unread)}: ignored")


def _check_own_code(fields: Fields, family: Family) -> None:
    """A folder may bring code of its own: that of its makers for the class that transformers has, too, or another."""
    own = fields.record.get("auto_map") or {}
    named = own.get("AutoModelForCausalLM", "") if isinstance(own, dict) else own
    if own and str(named).split(".")[-1] != family.architecture:
        raise fields.fail("auto_map", f" is {shown(own)}: a model with code of its own is not implemented")


@functools.cache
def warn_once(text: str) -> None:
    """Several parts of a program may read one file."""
    log.warning("%s", text)


def sizes(fields: Fields, family: Family) -> dict[str, int]:
    """The sizes that ModelConfig takes, by its names; their bounds hold before any weight is seen."""
    silent = {"head_dim": None} | ({"num_kv_heads": None} if family.infers_kv_heads else {})
    found = {ours: fields.integer(key, silent.get(ours, REQUIRED), most=most) for ours, (key, most) in SIZES.items()}
    found["num_kv_heads"] = found["num_kv_heads"] or found["num_heads"]
    found["head_dim"] = found["head_dim"] or family.head_dim or found["hidden_size"] // found["num_heads"]
    return found


def scalars(fields: Fields, hidden_size: int) -> dict[str, Any]:
    """The factors and softcaps that ModelConfig takes, by its names."""
    model_type = fields.record["model_type"]
    if model_type == "granite":
        return {
            "embedding_scale": fields.number("embedding_multiplier", 1.0),
            "residual_scale": fields.number("residual_multiplier", 1.0),
            "attention_scale": fields.number("attention_multiplier", 1.0),
            "logits_scale": 1 / fields.number("logits_scaling", 1.0),
        }
    if not model_type.startswith("gemma"):
        return {}
    found: dict[str, Any] = {"embedding_scale": hidden_size**0.5}
    if model_type != "gemma":
        found["attention_scale"] = fields.number("query_pre_attn_scalar", 256.0) ** -0.5
        found["logit_softcap"] = _softcap(fields, "final_logit_softcapping", 30.0 if model_type == "gemma2" else 0.0)
    if model_type == "gemma2":
        found["attention_softcap"] = _softcap(fields, "attn_logit_softcapping", 50.0)
    elif fields.record.get("attn_logit_softcapping"):  # Gemma 3: transformers reads it and does nothing with it
        raise fields.fail("attn_logit_softcapping", " is set, but this model type has none")
    return found


def _softcap(fields: Fields, key: str, silent: float) -> float:
    if key in fields.record and fields.record[key] is None:
        return 0.0  # null turns it off, no entry means the default
    return fields.number(key, silent) if key in fields.record else silent


def rope_layers(fields: Fields, family: Family, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer rotates; empty if all do."""
    if family.windows != "unrotated":
        return ()
    every = fields.integer("no_rope_layer_interval", 4)
    listed = fields.value("no_rope_layers", None) or [int((layer + 1) % every != 0) for layer in range(num_layers)]
    if not isinstance(listed, list) or len(listed) != num_layers or any(each not in (0, 1) for each in listed):
        raise fields.fail("no_rope_layers", f" is {shown(listed)}; expected a list of {num_layers} zeros and ones")
    return () if all(listed) else tuple(map(bool, listed))


def windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, by the rules of transformers; empty if no layer has one."""
    window, types = _window(fields, family), fields.record.get("layer_types")
    by_rule = tuple(window if has else None for has in _has_window(fields, family, num_layers))
    if types is None:
        chosen = by_rule
    else:
        chosen = _windows_of_types(fields, types, window, num_layers)
        if family.windows in ("none", "all") and chosen != by_rule:
            raise fields.fail("layer_types", f" = {shown(types)} does not fit the other settings of this model type")
    return chosen if any(chosen) else ()


def _has_window(fields: Fields, family: Family, num_layers: int) -> list[bool]:
    """Which layers have one if layer_types does not say it."""
    layers = range(num_layers)
    if family.windows == "upper":
        first = fields.integer("max_window_layers", 28, least=0)
        return [layer >= first for layer in layers]
    if family.windows == "unrotated":
        rotated = rope_layers(fields, family, num_layers) or [True] * num_layers
        return [not each for each in rotated]
    if isinstance(family.windows, int):
        reads_pattern = "sliding_window_pattern" in read_keys(family)
        every = fields.integer("sliding_window_pattern", family.windows) if reads_pattern else family.windows
        return [(layer + 1) % every != 0 for layer in layers]
    return [family.windows == "all" for _ in layers]


def _window(fields: Fields, family: Family) -> int | None:
    if family.windows == "none" or (family.switches_windows and not fields.flag("use_sliding_window", False)):
        return None
    if "sliding_window" in fields.record and fields.record["sliding_window"] is None:
        return None  # null turns it off, no entry means the default
    return fields.integer("sliding_window", family.window)


def _windows_of_types(fields: Fields, types: Any, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    by_type = {"full_attention": None, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.fail("layer_types", f" = {shown(types)}; expected a list of {num_layers} names")
    for name in types:
        if not isinstance(name, str) or name not in by_type:
            raise fields.fail("layer_types", f" names {shown(name)}: not implemented ({', '.join(by_type)} are)")
        if name == "sliding_attention" and window is None:
            raise fields.fail("layer_types", " asks for a sliding window, but sliding_window is off")
    return tuple(by_type[name] for name in types)
