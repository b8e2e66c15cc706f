"""Folders of safetensors: mapped, not read; damaged, incomplete, pickled or escaping ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ochat.errors import CheckpointError, ConfigError
from ochat.model.safetensors_files import INDEX, SINGLE, open_folder, torch_dtype, write_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    write_shards(tmp_path, [{"a": torch.arange(3.0)}, {"b": torch.ones(2, 2), "c": torch.zeros(1)}], 2)
    return tmp_path


def test_what_is_written_is_read(sharded):
    stored = open_folder(sharded)
    assert {name: tensor.path.name for name, tensor in stored.items()} == {"a": FIRST, "b": SECOND, "c": SECOND}
    assert torch.equal(stored["a"].read(), torch.arange(3.0)) and str(stored["b"]) == f"{sharded / SECOND}: b"
    assert stored["b"].shape == (2, 2) and stored["c"].dtype == "F32"
    assert not list(sharded.glob("*.tmp"))


def test_a_large_file_is_mapped_not_read(tmp_path):
    """400 MB in four tensors, while the process grows by less than half of one."""
    save_file({f"t{i}": torch.zeros(25_000_000) for i in range(4)}, tmp_path / SINGLE)
    before = resident_bytes()
    tensors = [stored.read() for stored in open_folder(tmp_path).values()]
    assert resident_bytes() - before < 50_000_000
    assert float(tensors[3][-1]) == 0.0


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("kept", [None, 0, 5, 40, -1])
def test_a_file_that_is_missing_or_cut_off_is_named(sharded, kept):
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).unlink()
    if kept is not None:
        (sharded / SECOND).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{SECOND}( is missing|: damaged or cut off)"):
        open_folder(sharded)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"d": FIRST}, f"{FIRST} holds d, but it does not"), ({"c": None}, f"does not say that {SECOND} holds c")],
)
def test_an_index_that_disagrees_with_the_files_is_refused(sharded, changes, named):
    record = json.loads((sharded / INDEX).read_text())
    weight_map = {name: file for name, file in (record["weight_map"] | changes).items() if file}
    (sharded / INDEX).write_text(json.dumps(record | {"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=named):
        open_folder(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX):
        open_folder(sharded)


def test_two_sets_of_weights_are_ambiguous(sharded):
    save_file({"a": torch.zeros(1)}, sharded / SINGLE)
    with pytest.raises(CheckpointError, match="holds both"):
        open_folder(sharded)


def test_pickled_weights_and_hub_ids_say_how_to_get_safetensors(tmp_path):
    with pytest.raises(ConfigError, match="neither model.safetensors nor"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pytorch_model.bin.*save_pretrained"):
        open_folder(tmp_path)
    with pytest.raises(ConfigError, match="hf download meta-llama/Llama-2-7b-hf --local-dir"):
        open_folder("meta-llama/Llama-2-7b-hf")


def test_dtypes_by_name():
    assert torch_dtype("bfloat16") is torch_dtype(torch.bfloat16) is torch.bfloat16
    for wrong in ("float64", "int8", "nn", "bf16"):
        with pytest.raises(ConfigError, match=repr(wrong)):
            torch_dtype(wrong)
