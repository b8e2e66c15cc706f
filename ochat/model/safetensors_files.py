"""The weights of a Hugging Face folder: one safetensors file, or several and an index.

    tensors = open_folder("path/to/base");  tensors["model.norm.weight"].read()
Only safetensors are read: a pickled `.bin` can run code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ochat.errors import CheckpointError, ConfigError, how_to_fetch
from ochat.files import atomic, bounded_json, model_folder, safetensors_file
from ochat.files.bounded_json import shown
from ochat.files.safetensors_file import StoredTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADVICE = "fetch it again"


def open_folder(directory: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's one file, or of its shards by their index, by name.

    Raises: ConfigError for a hub id or a folder without safetensors (it says how to get them); CheckpointError for a
    damaged or incomplete set of files, or pointers of Git LFS in their place.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder. {how_to_fetch(directory)}")
    has_single, has_index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if has_single and has_index:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is not the model's")
    if has_single:
        return _open_file(directory / SINGLE)
    if not has_index:
        problem = f"{directory} has neither {SINGLE} nor {INDEX}"
        raise ConfigError(f"{problem}. {model_folder.how_to_get_base(directory)}")
    index = _read_index(directory / INDEX)
    shards = {name: _open_shard(directory / name) for name in sorted(set(index.values()))}
    _compare_index(directory / INDEX, index, shards)
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def check_finite(tensor: Tensor, location: object) -> Tensor:
    """The tensor. Raises: CheckpointError naming `location` if a value is NaN or infinite. Costs: 0.05 s a GB."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN becomes both bounds
        raise CheckpointError(f"{location} holds a value that is NaN or infinite; {ADVICE}")
    return tensor


def write_shards(directory: Path, shards: Iterable[dict[str, Tensor]], num_shards: int) -> None:
    """Writes `num_shards` files and, for several, their index. Each file appears whole or not at all."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        safetensors_file.write(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        atomic.write_json(directory / INDEX, index)


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """bfloat16, float16 or float32 by name. Raises: ConfigError."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"dtype = {name!r} is not known; expected bfloat16, float16 or float32")
    return dtype


def _read_index(path: Path) -> dict[str, str]:
    weight_map = bounded_json.read_object(path, CheckpointError, ADVICE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is empty or no table; {ADVICE}")
    for tensor, name in weight_map.items():
        if not atomic.is_file_name(name) or not name.endswith(".safetensors"):
            at = f"{path}: weight_map[{shown(tensor)}]"
            raise CheckpointError(f"{at} is {shown(name)}; expected the name of a file in the same folder")
    return weight_map


def _open_shard(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        fetch = f"`hf download ORG/NAME {path.name} --local-dir {path.parent}`"
        raise CheckpointError(f"{path} is missing, but {INDEX} names it; fetch it with {fetch}")
    return _open_file(path)


def _open_file(path: Path) -> dict[str, StoredTensor]:
    model_folder.refuse_pointer(path)
    return safetensors_file.open_file(path, CheckpointError, ADVICE)


def _compare_index(path: Path, index: Mapping[str, str], shards: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    listed, held = set(index.items()), {(tensor, name) for name, shard in shards.items() for tensor in shard}
    for tensor, name in sorted(listed - held):
        raise CheckpointError(f"{path} says that {name} holds {tensor[:200]}, but it does not; fetch both again")
    for tensor, name in sorted(held - listed):
        raise CheckpointError(f"{path} does not say that {name} holds {tensor[:200]}, but it does; fetch both again")
