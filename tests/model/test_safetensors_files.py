"""Folders of safetensors: mapped, not read; damaged, incomplete, pickled or escaping ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ochat.errors import CheckpointError, ConfigError
from ochat.model.safetensors_files import INDEX, SINGLE, TensorFiles, torch_dtype, write_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    write_shards(tmp_path, [{"a": torch.arange(3.0)}, {"b": torch.ones(2, 2), "c": torch.zeros(1)}], 2)
    return tmp_path


def edit_index(folder, **weight_map):
    record = json.loads((folder / INDEX).read_text())
    record["weight_map"] |= weight_map
    record["weight_map"] = {name: file for name, file in record["weight_map"].items() if file}
    (folder / INDEX).write_text(json.dumps(record))


def test_what_is_written_is_read(sharded):
    files = TensorFiles.open(sharded)
    assert {name: file.path.name for name, file in files.files.items()} == {"a": FIRST, "b": SECOND, "c": SECOND}
    assert torch.equal(files.read("a"), torch.arange(3.0))
    assert files.shape("b") == (2, 2) and files.dtype("c") == "F32" and files.location("b") == f"{sharded / SECOND}: b"
    assert not list(sharded.glob("*.tmp"))


def test_a_large_file_is_mapped_not_read(tmp_path):
    """400 MB in four tensors, while the process grows by less than half of one."""
    save_file({f"t{i}": torch.zeros(25_000_000) for i in range(4)}, tmp_path / SINGLE)
    before = resident_bytes()
    files = TensorFiles.open(tmp_path)
    tensors = [files.read(name) for name in files.files]
    assert resident_bytes() - before < 50_000_000
    assert float(tensors[3][-1]) == 0.0


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_missing_shard_is_named(sharded):
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing"):
        TensorFiles.open(sharded)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_that_was_cut_off_is_named(sharded, kept):
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{SECOND}: damaged or cut off"):
        TensorFiles.open(sharded)


def test_an_index_that_disagrees_with_the_files_is_refused(sharded):
    edit_index(sharded, d=FIRST)
    with pytest.raises(CheckpointError, match=f"{FIRST} holds d, but it does not"):
        TensorFiles.open(sharded)
    edit_index(sharded, d=None, c=None)
    with pytest.raises(CheckpointError, match="does not list c"):
        TensorFiles.open(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        TensorFiles.open(sharded)


def test_two_sets_of_weights_are_ambiguous(sharded):
    save_file({"a": torch.zeros(1)}, sharded / SINGLE)
    with pytest.raises(CheckpointError, match="holds both"):
        TensorFiles.open(sharded)


def test_pickled_weights_and_hub_ids_say_how_to_get_safetensors(tmp_path):
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        TensorFiles.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pytorch_model.bin.*save_pretrained"):
        TensorFiles.open(tmp_path)
    with pytest.raises(ConfigError, match="hf download meta-llama/Llama-2-7b-hf --local-dir"):
        TensorFiles.open("meta-llama/Llama-2-7b-hf")


def test_dtypes_by_name():
    assert torch_dtype("bfloat16") is torch_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("float64", "int8", "nn", "bf16"):
        with pytest.raises(ConfigError, match=repr(wrong)):
            torch_dtype(wrong)
