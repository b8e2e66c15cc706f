"""Model families: which keys of a `config.json` are read, ignored as harmless, or refused.

    family = find(Fields(json.load(open("config.json")), "config.json"));  refuse_unimplemented(fields, family)
Defaults and special rules are those of transformers' classes, so a missing key means the same model in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ochat.files.bounded_json import REQUIRED, Fields, shown


@dataclass(frozen=True)
class Family:
    """What a model type fixes, or assumes where a key is missing (the values of transformers)."""

    architecture: str
    max_position_embeddings: int
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    reads_layer_types: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", 2048, reads_attention_bias=True, reads_mlp_bias=True),
    "mistral": Family("MistralForCausalLM", 131072),
    "qwen2": Family("Qwen2ForCausalLM", 32768, qkv_bias=True, reads_layer_types=True),
    "qwen3": Family("Qwen3ForCausalLM", 32768, 128, qk_norm=True, reads_attention_bias=True, reads_layer_types=True),
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
    "mistral3": ("Mistral3ForConditionalGeneration", {"model_type": "mistral"}),
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
ONLY = {"hidden_act": "silu", "attention_dropout": 0, "pretraining_tp": 1}

READ_KEYS = frozenset(
    """model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings hidden_act attention_bias
    mlp_bias attention_dropout pretraining_tp rope_theta rope_scaling rope_parameters partial_rotary_factor
    rope_local_base_freq original_max_position_embeddings
    sliding_window use_sliding_window max_window_layers layer_types bos_token_id eos_token_id pad_token_id
    initializer_range dtype torch_dtype""".split()  # noqa: SIM905 (reads better than a list of literals)
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
    decoder_start_token_id sep_token_id prefix task_specific_params finetuning_task
    tokenizer_class""".split()  # noqa: SIM905
)


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
    if around.get("architectures") == [architecture]:
        del around["architectures"]
    inner = {key: value for key, value in record["text_config"].items() if key != "architectures"}
    first = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return defaults | around | inner | {key: around[key] for key in first if key in around}


def find(fields: Fields) -> Family:
    """The family of a config's model_type, its architecture checked. Raises: ConfigError."""
    model_type = fields.value("model_type", REQUIRED)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise fields.fail("model_type", f" is {shown(model_type)}: not implemented ({', '.join(FAMILIES)} are)")
    family = FAMILIES[model_type]
    found = fields.record.get("architectures") or [family.architecture]
    if found != [family.architecture]:
        raise fields.fail("architectures", f" is {shown(found)}; expected [{family.architecture!r}] for {model_type!r}")
    return family


def refuse_unimplemented(fields: Fields, family: Family) -> None:
    """Raises: ConfigError for every setting that would change a logit and is not implemented."""
    record = fields.record
    for key, only in ONLY.items():
        if (found := record.get(key) or only) != only:
            raise fields.fail(key, f" is {shown(found)}; only {only!r} is implemented")
    if not family.reads_attention_bias and record.get("attention_bias") not in (None, family.qkv_bias):
        raise fields.fail("attention_bias", f" is {shown(record['attention_bias'])}, against what this model type has")
    if record.get("mlp_bias") and not family.reads_mlp_bias:
        raise fields.fail("mlp_bias", " is set, but this model type has none")
    for key in sorted(record.keys() - READ_KEYS - HARMLESS_KEYS):
        if record[key]:
            raise fields.fail(key, f" = {shown(record[key])} is not implemented; if it changes nothing, remove it")


def sizes(fields: Fields, family: Family) -> dict[str, int]:
    """The sizes that ModelConfig takes, by its names; their bounds hold before any weight is seen."""
    # Files of Llama 1 and 2 may leave the key/value heads out; the other families' silent defaults fit one size only.
    silent = {"head_dim": None} | ({"num_kv_heads": None} if family is FAMILIES["llama"] else {})
    found = {ours: fields.integer(key, silent.get(ours, REQUIRED), most=most) for ours, (key, most) in SIZES.items()}
    found["num_kv_heads"] = found["num_kv_heads"] or found["num_heads"]
    found["head_dim"] = found["head_dim"] or family.head_dim or found["hidden_size"] // found["num_heads"]
    return found


def windows(fields: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window, by the rules of transformers; empty if no layer has one."""
    types = fields.record.get("layer_types")
    window = _window(fields, family)
    first = fields.integer("max_window_layers", 28, least=0) if family.reads_layer_types else 0
    chosen = by_threshold = tuple(window if layer >= first else None for layer in range(num_layers))
    if types is not None:
        chosen = _windows_of_types(fields, types, window, num_layers)
        if not family.reads_layer_types and chosen != by_threshold:
            raise fields.fail("layer_types", f" = {shown(types)} does not fit the other settings of this model type")
    return chosen if any(chosen) else ()


def _window(fields: Fields, family: Family) -> int | None:
    silent = None if "sliding_window" in fields.record else 4096  # null turns it off, no entry means the default
    if family is FAMILIES["llama"]:
        if fields.record.get("sliding_window") is not None or fields.record.get("use_sliding_window"):
            raise fields.fail("sliding_window", " is set, but this model type has none (model_type 'mistral' has)")
        return None
    if family is FAMILIES["mistral"]:
        if fields.record.get("use_sliding_window") is False:
            raise fields.fail("use_sliding_window", " is false, but unknown here; set sliding_window to null")
        return fields.integer("sliding_window", silent)
    return fields.integer("sliding_window", silent) if fields.flag("use_sliding_window", False) else None


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
