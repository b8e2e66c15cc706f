"""A safetensors file laid out in (pinned) host memory once, then filled and written many times.

    file = PinnedSafetensors({"a": tensor});  file.snapshot({"a": tensor});  written = file.write(path)
Only `snapshot` makes the device wait; the checksum is taken of the bytes on their way to the disk. The format: 8 bytes
with the header's length, a JSON header, then the tensors end to end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CHUNK_BYTES = 1 << 24  # hashed while it is still in the processor's cache, then written


class PinnedSafetensors:
    """A buffer with the file's header and a view for each tensor; pinned where the tensors are on a card."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes names, shapes and dtypes from tensors of one dtype, so that each view is aligned."""
        header, size = {}, 0
        for name, tensor in tensors.items():
            offsets = [size, size := size + tensor.nbytes]
            header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._is_pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._buffer = torch.empty(start + size, dtype=torch.uint8, pin_memory=self._is_pinned)
        self._buffer[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._views = {}
        for name, tensor in tensors.items():
            first, end = header[name]["data_offsets"]
            self._views[name] = self._buffer[start + first : start + end].view(tensor.dtype).view(tensor.shape)

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
