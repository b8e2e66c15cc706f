"""The weights of a Hugging Face folder: mapped into memory and read tensor by tensor, or written shard by shard.

    files = TensorFiles.open("path/to/base");  files.read("model.norm.weight")
Only safetensors are read: a pickled `.bin` can run code. Nothing is read before it is asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ochat.errors import CheckpointError, ConfigError
from ochat.files import atomic, bounded_json, hub
from ochat.model.fields import shown

MAX_HEADER_BYTES = 1 << 25  # a model of a hundred thousand tensors has half of it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorFiles:
    """Which file holds which tensor; `handles` are open maps of the files."""

    directory: Path
    files: Mapping[str, str]  # tensor -> file
    handles: Mapping[str, Any]  # file -> safetensors handle

    @classmethod
    def open(cls, directory: str | Path) -> TensorFiles:
        """Map the folder's one file, or its shards by their index.

        Raises: ConfigError for a hub id or a folder without safetensors (it says how to get them); CheckpointError for
        a damaged or incomplete set of files.
        """
        directory = Path(directory)
        index = _index(directory)
        names = sorted(set(index.values())) if index is not None else [SINGLE]
        handles = {name: _open_file(directory / name) for name in names}
        found = {tensor: name for name in names for tensor in handles[name].keys()}  # noqa: SIM118 (a handle is no dict)
        if index is not None:
            _compare_index(directory / INDEX, index, found, handles)
        return cls(directory, found, handles)

    def place(self, name: str) -> str:
        """The path of the file that holds a tensor, for messages."""
        return str(self.directory / self.files[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the file's header alone."""
        return tuple(self.handles[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The format's name: F32, BF16, ..."""
        return self.handles[self.files[name]].get_slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """A CPU tensor whose pages are read from disk when touched. Do not write to it."""
        return self.handles[self.files[name]].get_tensor(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, mapped like the whole: no other byte is touched."""
        return read_rows(self.handles[self.files[name]], name, start, stop)


def check_finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor. Raises: CheckpointError naming `where` if a value is NaN or infinite. Costs: 0.05 s a GB."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN becomes both bounds
        raise CheckpointError(f"{where} holds a value that is NaN or infinite; fetch it again")
    return tensor


def read_rows(handle: Any, name: str, start: int, stop: int) -> Tensor:
    """The rows from `start` to `stop` of a tensor in an open safetensors file."""
    return handle.get_slice(name)[start:stop]


def write_shards(directory: Path, shards: Iterable[dict[str, Tensor]], num_shards: int) -> None:
    """Write `num_shards` files and, for several, their index. Each file appears whole or not at all."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if num_shards == 1 else f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
        total_size += sum(tensor.nbytes for tensor in shard.values())
    if num_shards > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        atomic.write_json(directory / INDEX, index)


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, whole and on the disk before it has its name, readable for whoever may read its folder."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path}: cannot be written: {error}") from None
    temporary.chmod(path.parent.stat().st_mode & 0o666)  # the library keeps files to their owner
    atomic.replace(temporary, path)


def _index(directory: Path) -> dict[str, str] | None:
    """tensor -> file of a sharded folder; None for a single file."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a folder. {hub.how_to_fetch(directory)}")
    has_single, has_index = (directory / SINGLE).is_file(), (directory / INDEX).is_file()
    if has_single and has_index:
        raise CheckpointError(f"{directory} holds both {SINGLE} and {INDEX}; remove the one that is not the model's")
    if has_index:
        return _read_index(directory / INDEX)
    if not has_single:
        raise ConfigError(_no_safetensors(directory))
    return None


def _no_safetensors(directory: Path) -> str:
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
    problem = f"{directory} has neither {SINGLE} nor {INDEX}"
    if not pickled:
        return f"{problem}; expected the weights of a Hugging Face model there"
    return (
        f"{problem}, but {pickled[0]}: pickled weights can run code and are not read. Convert them with transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}, dtype='auto').save_pretrained(NEW_DIR)"
    )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = bounded_json.read_object(path, CheckpointError, "fetch it again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is empty or no table; fetch it again")
    for tensor, name in weight_map.items():
        if not atomic.is_name(name) or not name.endswith(".safetensors"):
            at = f"{path}: weight_map[{shown(tensor)}]"
            raise CheckpointError(f"{at} is {shown(name)}; expected the name of a file beside it")
    return weight_map


def _open_file(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, but {INDEX} names it; fetch it again")
    try:
        handle = safe_open(path, framework="pt", device="cpu")  # offsets tile the file, and shapes fit them
        _check_names(path)
        return handle
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); fetch it again") from None


def _check_names(path: Path) -> None:
    """Raises: ValueError for a header that names a tensor twice, of which the library silently takes the last, or that
    is far larger than any model's."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size:,} bytes")
        json.loads(file.read(size), object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} stands twice in its header")
    return found


def _compare_index(path: Path, index: Mapping[str, str], found: Mapping[str, str], handles: Mapping[str, Any]) -> None:
    for tensor, name in index.items():
        if tensor not in handles[name].keys():  # noqa: SIM118
            raise CheckpointError(f"{path} says that {name} holds {tensor[:200]}, but it does not; fetch both again")
    for tensor, name in found.items():
        if index.get(tensor) != name:
            says = f"says that {index[tensor]} holds" if tensor in index else "does not list"
            raise CheckpointError(f"{path} {says} {tensor}, which {name} holds; fetch both again")


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """bfloat16, float16 or float32 by name. Raises: ConfigError."""
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"dtype = {name!r} is not known; expected bfloat16, float16 or float32")
    return dtype
