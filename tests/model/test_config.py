"""config.json in either spelling: read as transformers reads it, written so that it reads it back, refused by name."""

import dataclasses
import json

import pytest
import torch
import transformers

from ochat.errors import ConfigError
from ochat.model import hf
from ochat.model.config import ModelConfig, settings
from ochat.model.families import warn_once
from ochat.model.rope import RopeConfig
from tests.model_families import FAMILIES, config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
GEMMA2 = LLAMA | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
PHI3 = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
PHI3_CODE = {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
OWN_CODE = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_both_spellings_are_one_config():
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}, "torch_dtype": "bfloat16"}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}, "dtype": "bfloat16"}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert ModelConfig.from_hf(old).dtype == ModelConfig.from_hf(new).dtype == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reads_back_here_and_there(family, tmp_path):
    record = config(family).to_dict()
    ours = ModelConfig.from_hf(record)
    assert ModelConfig.from_hf(ours.to_hf()) == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    for ids in ([7, 9], 2, None):
        assert ModelConfig.from_hf(record | {"eos_token_id": ids}).to_hf()["eos_token_id"] == ids
    for key in record.keys() - {"architectures", "dtype", "transformers_version", "_name_or_path", "max_window_layers"}:
        assert theirs[key] == record[key], key


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_the_peer_has_them(family):
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config(family))
    ours = ModelConfig.from_hf(config(family).to_dict())
    assert ours.num_parameters() == sum(parameter.numel() for parameter in peer.parameters())
    blocks = {name: p for name, p in peer.named_parameters() if ".layers." in name and name.endswith("proj.weight")}
    assert ours.matmul_params() == sum(parameter.numel() for parameter in blocks.values())
    assert ours.head_params() == peer.lm_head.weight.numel()
    shapes = [part.shape for parts in hf.parameter_parts(ours).values() for part in parts]
    assert sorted(shapes) == sorted(tuple(parameter.shape) for parameter in peer.parameters())


def test_flops_of_a_step_are_those_of_its_products():
    """Count every product of one forward by hand; backward costs twice as much."""
    config = ModelConfig.from_hf(LLAMA)  # H 32, F 48, L 2, N 4, K 2, D 8, V 64
    lengths, supervised = [5, 3], 4
    tokens = sum(lengths)
    linear = 2 * tokens * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48)
    attention = sum(2 * 2 * 4 * 8 * length * length / 2 for length in lengths)
    forward = 2 * (linear + attention) + 2 * supervised * 32 * 64
    assert config.flops_per_step(tokens, sum(length**2 for length in lengths), supervised) == 3 * forward


def test_silent_settings_mean_what_transformers_means():
    left_out = {"num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"}
    llama1 = ModelConfig.from_hf({key: value for key, value in LLAMA.items() if key not in left_out})
    assert llama1 == dataclasses.replace(ModelConfig.from_hf(LLAMA), num_kv_heads=4, norm_eps=1e-6)
    assert llama1.rope == RopeConfig(10000.0)
    assert ModelConfig.from_hf(QWEN3).head_dim == 128
    assert ModelConfig.from_hf(LLAMA | {"head_dim": 6}).head_dim == 6


THREE = {"num_hidden_layers": 3, "sliding_window": 7}
SLIDING = QWEN2 | THREE | {"use_sliding_window": True}
FIRST_SLIDES = ["sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("record", "windows"),
    [
        (LLAMA | {"layer_types": ["full_attention"] * 2}, ()),
        (MISTRAL, (4096, 4096)),
        (MISTRAL | {"sliding_window": None}, ()),
        (MISTRAL | THREE, (7, 7, 7)),
        (SLIDING | {"use_sliding_window": False}, ()),
        (SLIDING | {"max_window_layers": 1}, (None, 7, 7)),
        (SLIDING | {"max_window_layers": 3}, ()),
        (SLIDING | {"layer_types": FIRST_SLIDES}, (7, None, None)),
    ],
)
def test_windows_per_layer(record, windows):
    config = ModelConfig.from_hf(record)
    assert config.windows == windows
    assert [config.window(layer) for layer in range(len(windows))] == list(windows)


@pytest.mark.parametrize(
    ("base", "change", "named"),
    [
        (LLAMA, {"model_type": "hunyuan", "num_experts": 1}, "model_type is 'hunyuan': not implemented .llama, "),
        (LLAMA, {"model_type": "mixtral", "num_local_experts": 8}, "'mixtral' .mixture-of-experts model.: not implem"),
        (LLAMA, {"model_type": "qwen3_vl", "text_config": LLAMA}, "'qwen3_vl' .multimodal model.: not implemented"),
        (
            LLAMA,
            {"model_type": "jamba", "text_config": {"num_experts": 16, "mamba_d_state": 16}},
            "'jamba' .mixture-of-experts, multimodal, linear-attention or state-space model.: not implemented",
        ),
        (LLAMA, {"model_type": "t5gemma", "is_encoder_decoder": True}, "'t5gemma' .encoder-decoder model."),
        (LLAMA, {"model_type": None}, "model_type is missing"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures.*SequenceClassification"),
        (LLAMA, {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config.*take the unquantised base"),
        (LLAMA, {"quantization": {"bits": 4}}, "quantization = .*take the unquantised base"),
        (LLAMA, {"auto_map": {"AutoModel": "modeling.py"}}, "auto_map"),
        (
            LLAMA,
            {"auto_map": OWN_CODE, "some_new_trick": True},
            "some_new_trick = True: may be read by the model",
        ),
        (PHI3, {"auto_map": PHI3_CODE, "interpolate_factor": 2}, "interpolate_factor = 2: may be read by the model"),
        (LLAMA, {"is_causal": False}, "is_causal is false; only causal attention"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention.*only causal attention"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA2, {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is set, but this model type has none"),
        (SMOLLM3, {"no_rope_layers": [1, 2]}, r"no_rope_layers is \[1, 2\]; expected a list of 2"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types.*list of 2"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA, {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling: rope_type is 'mrope'"),
        (LLAMA, {"rope_parameters": {"rope_type": "axial", "factor": 2.0}}, "rope_parameters: rope_type is 'axial'"),
        (LLAMA, {"vocab_size": None}, "vocab_size is missing"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads = 4 is no multiple of 3"),
        (LLAMA, {"hidden_size": 34}, "hidden_size = 34 is no multiple of 4"),
        (LLAMA, {"head_dim": 7}, "head_dim = 7 is odd"),
        (LLAMA, {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        (MISTRAL, {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        (MISTRAL, {"sliding_window": 8, "layer_types": ["full_attention"] * 2}, "layer_types"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 2}, "layer_types asks for a sliding window"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 2}, "layer_types names 'chunked_attention'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(base, change, named):
    ModelConfig.from_hf(base, "base/config.json")
    with pytest.raises(ConfigError, match=f"^base/config.json: .*{named}"):
        ModelConfig.from_hf(base | change, "base/config.json")


@pytest.mark.parametrize(
    ("base", "unread"),
    [
        (LLAMA, {"is_llama_config": True, "unsloth_fixed": True}),
        (LLAMA, {"max_sequence_length": 2048, "rope_interleaved": True}),
        (LLAMA, {"sliding_window": 4096, "final_logit_softcapping": 30.0, "num_local_experts": 8}),
        (MISTRAL, {"attention_bias": True, "mlp_bias": True}),
        (MISTRAL, {"use_sliding_window": True}),
        (QWEN2, {"attention_multiplier": 2.0, "dual_chunk_attention_config": {"chunk_size": 9}}),
        (QWEN3, {"no_rope_layers": [1, 0], "num_experts": 128}),
        (GEMMA2, {"sliding_window_pattern": 7}),
    ],
)
def test_what_the_class_of_transformers_never_reads_is_warned_of(base, unread, caplog):
    """And not written."""
    warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        found = ModelConfig.from_hf(base | unread)
    assert found == ModelConfig.from_hf(base) and not found.to_hf().keys() & unread.keys()
    assert ", ".join(sorted(unread)) in caplog.text and base["architectures"][0] in caplog.text


def test_dropout_is_warned_of(caplog):
    """No logit depends on it; Seed-OSS is published with it."""
    warn_once.cache_clear()
    dropped = LLAMA | {"attention_dropout": 0.1}
    assert ModelConfig.from_hf(dropped) == ModelConfig.from_hf(LLAMA)
    assert "attention_dropout: no dropout is applied in training" in caplog.text
    assert ModelConfig.from_hf(dropped).to_hf()["attention_dropout"] == 0.1


def test_settings_hold_what_distinguishes_two_models_and_no_default():
    config = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "dtype": "bfloat16", "hidden_act": "silu"})
    wanted = {"model_type": "llama", "hidden_size": 32, "rope": {"theta": 5e5}}
    assert settings(config).items() >= wanted.items() and not settings(config).keys() & {"dtype", "source", "qk_norm"}
    json.dumps(settings(dataclasses.replace(config, windows=(None, 3))))


def test_what_was_changed_in_code_must_be_expressible():
    config = dataclasses.replace(ModelConfig.from_hf(LLAMA), vocab_size=70, eos_token_ids=(3, 4))
    assert (config.to_hf()["vocab_size"], config.to_hf()["eos_token_id"]) == (70, [3, 4])
    with pytest.raises(ConfigError, match="a llama model cannot express"):
        dataclasses.replace(config, residual_scale=0.5).to_hf()


def test_what_phi4_mini_says_to_its_own_code_changes_nothing(caplog):
    warn_once.cache_clear()
    found = ModelConfig.from_hf(PHI3 | {"auto_map": PHI3_CODE, "full_attn_mod": 1, "interpolate_factor": 1})
    assert found == ModelConfig.from_hf(PHI3) and not caplog.text


def test_gelu_of_gemma_1_is_written_as_what_it_means():
    """Versions of transformers differ in what they take for "gelu"."""
    gemma = LLAMA | {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    assert ModelConfig.from_hf(gemma).to_hf()["hidden_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "FSDPLlamaForCausalLM", "LLaMAForCausalLM"])
def test_names_that_one_class_has_had(name):
    assert ModelConfig.from_hf(LLAMA | {"architectures": [name]}).to_hf()["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_without_a_warning(family, caplog):
    warn_once.cache_clear()
    ours = ModelConfig.from_hf(config(family).to_dict() | {"attention_dropout": 0.0})
    caplog.clear()
    ModelConfig.from_hf(ours.to_hf())
    assert not caplog.text


def test_harmless_settings_are_no_obstacle():
    harmless = {
        "use_cache": False, "transformers_version": "4.40.0", "_name_or_path": "x", "temperature": 0.7,
        "max_length": 4096, "pretraining_tp": 2, "attention_dropout": 0.0, "quantization_config": None,
        "is_decoder": False, "pruned_heads": {}, "auto_map": OWN_CODE,
        "partial_rotary_factor": 1.0, "rope_scaling": None,
    }  # fmt: skip
    assert ModelConfig.from_hf(LLAMA | harmless) == ModelConfig.from_hf(LLAMA)
