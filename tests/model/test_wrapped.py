"""The text part of multimodal models: its config and tensors are found in transformers' files, old and new."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions
from ochat.errors import CheckpointError, ConfigError
from ochat.export.hf_folder import export
from ochat.model import families, hf
from ochat.model.config import ModelConfig
from tests import tiny
from tests.model.test_init_base import write_json_tokenizer
from tests.model_families import random_ids

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
WRAPPED = {
    "Mistral3": (
        {"model_type": "mistral", "num_hidden_layers": 2, "rms_norm_eps": 1e-5},
        {"model_type": "pixtral", "head_dim": 16},
        {},
    ),
    "Gemma3": (
        {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 16},
        {"model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
    ),
}
KINDS = [name for name in WRAPPED if WRAPPED[name][0]["model_type"] in families.FAMILIES]


def make(kind, folder, vocab_size=97, **options):
    """The peer, random in every number, saved in `folder`."""
    torch.manual_seed(0)
    text, vision, rest = WRAPPED[kind]
    config = getattr(transformers, f"{kind}Config")(
        text_config=SMALL | text | {"vocab_size": vocab_size}, vision_config=VISION | vision, **rest, **options
    )
    peer = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0.0, 0.3)
    peer.save_pretrained(folder)
    return peer


def rename(folder, spelling):
    """From the old names, which transformers writes, to those of its modules, or back."""
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    if spelling == "new":
        new = {"language_model.lm_head": "lm_head", "language_model.model": "model.language_model"}
        new |= {name: f"model.{name}" for name in ("vision_tower", "multi_modal_projector")}
        for old, name in new.items():
            tensors = {key.replace(old, name, 1) if key.startswith(old) else key: t for key, t in tensors.items()}
        assert not any(name.startswith("language_model") for name in tensors)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@torch.no_grad()
def peer_logits(peer, ids):
    return peer(torch.tensor([ids]), token_type_ids=torch.zeros(1, len(ids), dtype=torch.int)).logits[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_text_models_logits_are_those_of_the_whole(kind, spelling, is_tied, tmp_path, caplog):
    peer, (ids,) = make(kind, tmp_path, tie_word_embeddings=is_tied), random_ids(20)
    names = rename(tmp_path, spelling)
    with caplog.at_level(logging.INFO):
        model = hf.load(tmp_path, dtype="float32")
        hf.open_tensors(tmp_path, model.config)  # a second time: one note all the same
    assert model.config.tie_embeddings == is_tied
    wanted = peer_logits(peer, ids)
    torch.testing.assert_close(model.logits([ids])[0], wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)
    count = sum("vision_tower" in name or "multi_modal_projector" in name for name in names)
    (note,) = [record.getMessage() for record in caplog.records]
    assert f"{count} vision tensors are left out of the text model: " in note
    assert "multi_modal_projector." in note


@pytest.mark.parametrize("kind", KINDS)
def test_init_base_writes_a_plain_text_model(kind, tmp_path):
    peer, (ids,) = make(kind, tmp_path / "source", tie_word_embeddings=False), random_ids(20)
    write_json_tokenizer(tmp_path / "source")
    init_base.main(InitBaseOptions(tmp_path / "out", hf=tmp_path / "source", add_token=("<|spare|>",)))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == {"Mistral3": "MistralForCausalLM", "Gemma3": "Gemma3ForCausalLM"}[kind]
    assert {"lm_head.weight", "model.norm.weight"} < load_file(tmp_path / "out" / "model.safetensors").keys()
    wanted = peer_logits(peer, ids)
    found = plain(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


def test_only_vision_tensors_of_a_multimodal_model_are_left_out(tmp_path):
    make("Mistral3", tmp_path, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"audio_tower.norm.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds audio_tower.norm.weight, which"):
        hf.load(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record["text_config"]))
    with pytest.raises(CheckpointError, match=r"holds multi_modal_projector.linear_1.weight, .* 10 more, which"):
        hf.load(tmp_path)


def test_what_text_config_leaves_out_stands_around_it_or_is_the_default():
    """As in the published files of Gemma 3 and Mistral Small 3.1."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "eos_token_id": 1, "tie_word_embeddings": True}
    record = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
        "vision_config": {"hidden_size": 1152}, "image_token_index": 262144, "initializer_range": 0.03,
        "eos_token_id": [1, 106], "torch_dtype": "bfloat16", "tie_word_embeddings": False, "unknown": 1,
    }  # fmt: skip
    found = families.text_record(record)
    assert families.is_multimodal(record) and "architectures" not in found and "vision_config" not in found
    wanted = {
        "model_type": "gemma3_text", "hidden_size": 2560, "vocab_size": 262208, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "eos_token_id": [1, 106], "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "initializer_range": 0.03, "unknown": 1,
    }  # fmt: skip
    assert wanted.items() <= found.items()
    for plain in (text, record | {"model_type": "llava"}, record | {"text_config": None}):
        assert families.text_record(plain) is plain and not families.is_multimodal(plain)


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_defaults_are_those_of_transformers(kind):
    name, (text, _, _) = kind.lower(), WRAPPED[kind]
    peer = getattr(transformers, f"{kind}Config")(text_config={"model_type": text["model_type"]}).text_config
    found = families.text_record({"model_type": name, "text_config": {}})
    assert {key: getattr(peer, key) for key in found} == dict(found)


def test_other_classes_of_a_multimodal_model_are_refused():
    record = {"model_type": "mistral3", "architectures": ["Mistral3Model"], "text_config": SMALL}
    with pytest.raises(ConfigError, match="architectures is .'Mistral3Model'.; expected .'MistralForCausalLM'."):
        ModelConfig.from_hf(record)


def test_a_run_on_the_folder_is_one_on_its_text_model(tmp_path):
    world = tiny.make(tmp_path)
    size = ModelConfig.load(world.base).vocab_size
    make("Mistral3", tmp_path / "whole", vocab_size=size)
    for path in world.base.glob("*token*"):
        shutil.copy(path, tmp_path / "whole")
    init_base.main(InitBaseOptions(tmp_path / "text", hf=tmp_path / "whole"))
    for options in ((), ("--lora.rank=2",)):
        curves = []
        for base in ("whole", "text"):
            run = tmp_path / f"{base}{len(options)}"
            curves.append(
                tiny.curve(tiny.train(world, run, "--data.max_steps=2", f"--base.path={tmp_path / base}", *options))
            )
            exported = load_file(run / "export" / "model.safetensors")
            assert exported.keys() == load_file(tmp_path / "text" / "model.safetensors").keys()
        assert curves[0] == curves[1]

    run, adapter = tmp_path / "whole1", tmp_path / "adapter"
    with pytest.raises(ConfigError, match=f"`ochat init-base --hf {tmp_path / 'whole'} NEW_DIR` .* --base NEW_DIR"):
        export(run, adapter, adapter=True)
    export(run, adapter, adapter=True, base=str(tmp_path / "text"))
    export(run, tmp_path / "merged", dtype="float32", base=str(tmp_path / "text"))
    peft = pytest.importorskip("peft", reason="PyPI `peft` (extra `dev`) is not installed")
    ids = torch.tensor(random_ids(20))
    with torch.no_grad():
        found = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained
        wanted, untrained = (plain(tmp_path / name)(ids).logits for name in ("merged", "text"))
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, atol=2e-5 * scale, rtol=0)
    assert (wanted - untrained).abs().max() > 1e-3 * scale
