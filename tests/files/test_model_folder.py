"""Folders that users name as a base and that are none: the error says what is there, and its command makes a base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ochat.errors import CheckpointError, ConfigError
from ochat.model import hf
from ochat.model.gguf import GGUFFile
from ochat.model.safetensors_files import INDEX, SINGLE
from ochat.text import tokenizer as tokenizers
from tests.model_families import make, peer_logits, random_ids

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 2200119864\n".format("0" * 64)


@pytest.fixture
def base(tmp_path):
    make("llama2", tmp_path / "base")
    return tmp_path / "base"


def error(folder) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        hf.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def run_python(message: str, replace: tuple[str, str] = ("", "")) -> None:
    """Runs the code of the message's `python -c "..."`."""
    _, _, rest = message.partition('python -c "')
    code, _, _ = rest.partition('"')
    exec(code.replace(*replace), {})


def assert_same_logits(folder, peer) -> None:
    (ids,) = random_ids(20)
    (ours,) = hf.load(folder, dtype="float32").logits([ids])
    torch.testing.assert_close(ours, peer_logits(peer, ids), atol=1e-4, rtol=1e-4)


def test_pointers_of_git_lfs(base):
    (base / SINGLE).write_text(POINTER)
    assert f"{SINGLE}: a Git LFS pointer instead of the file; fetch it with `git -C {base} lfs pull`" in error(base)
    (base / SINGLE).rename(base / "model-00001-of-00001.safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors: a Git LFS pointer" in error(base)


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, "whole"])
def test_a_folder_of_gguf_files_names_the_least_quantised(base, config):
    """With no config.json, one that names the type alone, or a whole one: all three are published."""
    (base / SINGLE).unlink()
    if config != "whole":
        (base / "config.json").unlink()
    if isinstance(config, dict):
        (base / "config.json").write_text(json.dumps(config))
    (base / "m.Q4_K_M.gguf").write_bytes(b"GGUF" * 4)
    (base / "m.Q8_0.gguf").write_bytes(b"GGUF" * 8)
    advice = f"`ochat init-base --gguf {base / 'm.Q8_0.gguf'} NEW_DIR`"
    assert advice in error(base)
    with pytest.raises(ConfigError, match=advice):  # as prepare, which reads no weights
        tokenizers.load(base)


def test_a_file_where_a_folder_is_expected_and_the_other_way_round(base):
    (base / "model.safetensors").unlink()
    (base / "model-Q4_0.gguf").write_bytes(b"GGUF")
    file = base / "model-Q4_0.gguf"
    assert f"{file.name} is a GGUF file: make a base of it with `ochat init-base --gguf {file} " in error(file)
    with pytest.raises(ConfigError, match=f"{base} is a folder. It holds GGUF: .*--gguf {file} "):
        GGUFFile(base)


def test_an_adapter_names_its_base_and_merges_into_it(base, tmp_path):
    peft = pytest.importorskip("peft", reason="PyPI `peft` (extra `dev`) is not installed")
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(peer, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    for has_config in (False, True):  # some trainers put the base's there
        if has_config:
            shutil.copy(base / "config.json", tmp_path / "adapter")
        message = error(tmp_path / "adapter")
        assert f"an adapter of '{base}', no whole model: train on '{base}' itself, or merge" in message
    run_python(message, ("NEW_DIR", str(tmp_path / "merged")))
    assert_same_logits(tmp_path / "merged", adapted)
    (tmp_path / "adapter" / "adapter_config.json").write_text("[")
    assert "an adapter of its base" in error(tmp_path / "adapter")

    save_file({name: t.contiguous() for name, t in adapted.state_dict().items()}, base / SINGLE)  # saved unmerged
    assert "lora_A.default.weight" in (message := error(base)) and "merge_and_unload" in message


def test_pickled_weights_are_converted_by_the_command(base):
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.save(load_file(base / SINGLE), base / "pytorch_model.bin")
    assert_same_logits(base, peer)  # with safetensors beside them, they are not read
    (base / SINGLE).unlink()
    message = error(base)
    assert "pytorch_model.bin is pickled" in message
    run_python(message)
    assert_same_logits(base, peer)


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (("consolidated.safetensors", "params.json"), "consolidated.safetensors is in another format: fetch the model"),
        (("consolidated.00.pth",), "consolidated.00.pth is in another format"),
        (("model-00001-of-00002.safetensors",), "model.safetensors.index.json too"),
        (("gptq_model-4bit-128g.safetensors",), "rename it to model.safetensors"),
        (("checkpoint-20/model.safetensors", "training_args.bin", "optimizer.pt"), "checkpoint-20 has weights"),
        (("snapshots/0123abcd/model-00001-of-00002.safetensors", "refs/main"), "snapshots/0123abcd has weights"),
        (("README.md", "training_args.bin"), "hf download ORG/NAME --local-dir DIR"),
    ],
)
def test_other_folders_say_where_the_weights_are(base, files, advice):
    (base / SINGLE).unlink()
    for name in files:
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(b"")
    assert advice in error(base)
    (base / "config.json").unlink()
    assert advice in error(base)


def test_formats_that_lie_next_to_the_weights_are_not_read(base):
    """As in the folders of Llama 3 and Mistral."""
    peer = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "original").mkdir()
    for name in ("consolidated.safetensors", "original/consolidated.00.pth", "m.gguf", "pytorch_model.bin"):
        (base / name).write_bytes(b"nothing that can be read")
    assert_same_logits(base, peer)
