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


def cut_off(name, kept):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def index(**changes):
    def edit(folder):
        record = json.loads((folder / INDEX).read_text())
        weight_map = {name: file for name, file in (record["weight_map"] | changes).items() if file}
        (folder / INDEX).write_text(json.dumps(record | {"weight_map": weight_map}))

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
        *((cut_off(SECOND, kept), f"{SECOND}: damaged or cut off") for kept in (0, 5, 40, -1)),
        (index(d=FIRST), f"{FIRST} holds d, but it does not"),
        (index(c=None), f"does not say that {SECOND} holds c"),
        (index(a=None, b=None, c=None), INDEX),
        *((cut_off(INDEX, kept), INDEX) for kept in (0, -3)),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": ["a"]}'), INDEX),
        (lambda folder: save_file({"a": torch.zeros(1)}, folder / SINGLE), "holds both"),
    ],
)
def test_files_that_are_damaged_or_disagree_are_named(sharded, edit, named):
    edit(sharded)
    with pytest.raises(CheckpointError, match=named):
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
