"""Read and write one safetensors file: mapped into memory, its header checked, read by tensor or by rows.

    write(path, {"a": torch.zeros(3, 2)});  tensors = open_file(path, CheckpointError, "fetch it again")
    tensors["a"].rows(0, 2)
    copy = PinnedSafetensors(tensors);  copy.snapshot(tensors);  written = copy.write(path)

No byte of a tensor is read from the disk before it is used. The format: 8 bytes with the header's length, a JSON
header, then the tensors end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ochat.errors import OchatError
from ochat.files import atomic
from ochat.files.safetensors_header import open_checked

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHUNK_BYTES = 1 << 24  # hashed while it is still in the processor's cache, then written


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of an open file; as a string, file and tensor for messages."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # the format's name: F32, BF16, ...
    _file: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.name}"

    def read(self) -> Tensor:
        """A CPU tensor mapped from the file. Do not write to it."""
        return self._file.get_tensor(self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, mapped like the whole: no other byte is touched."""
        return self._file.get_slice(self.name)[start:stop]


def open_file(path: Path, error: type[OchatError], advice: str) -> dict[str, StoredTensor]:
    """A file's tensors by name, in the order of its header.

    Raises: `error`, ending with `advice`, for a file that is missing, damaged or cut off, or whose header is oversized
    or names a tensor twice.
    """
    try:
        file = open_checked(path, "pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
        return {name: StoredTensor(path, name, tuple(x.get_shape()), x.get_dtype(), file) for name, x in slices.items()}
    except (SafetensorError, OSError, ValueError) as problem:
        raise error(f"{path}: damaged or cut off ({problem}); {advice}") from None


class PinnedSafetensors:
    """A file laid out in (pinned) host memory once, then filled and written many times: its header, and a view for each
    tensor. Only `snapshot` makes a device wait."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes names, shapes and dtypes from tensors of one dtype, so that each view is aligned; pinned where they are
        on a card."""
        header, size = {}, 0
        for name, tensor in tensors.items():
            offsets = [size, size := size + tensor.nbytes]
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        self._is_pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(len(start) + size, dtype=torch.uint8, pin_memory=self._is_pinned)
        first, *parts = self._buffer.split([len(start), *(tensor.nbytes for tensor in tensors.values())])
        first.copy_(torch.frombuffer(bytearray(start), dtype=torch.uint8))
        self._views = {n: p.view(t.dtype).view(t.shape) for (n, t), p in zip(tensors.items(), parts, strict=True)}

    @torch.no_grad()
    def snapshot(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the tensors; on a card the copies are complete once its stream is synchronised."""
        for name, view in self._views.items():
            view.copy_(tensors[name], non_blocking=self._is_pinned)

    def write(self, path: Path) -> dict[str, Any]:
        """Writes the file and waits until it is on the disk; returns its size and checksum. Raises: OSError."""
        content, digest = self._buffer.numpy().data, hashlib.sha256()
        with path.open("wb") as file:
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return {"bytes": len(content), "sha256": digest.hexdigest()}


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file atomically, readable for everyone who may read its folder. Raises: OSError."""
    temporary = path.with_name(path.name + ".tmp")
    atomic.unlink(temporary)
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise OSError(f"{path}: cannot be written: {error}") from None
    temporary.chmod(path.parent.stat().st_mode & 0o666)  # the library keeps files to their owner
    atomic.replace(temporary, path)
