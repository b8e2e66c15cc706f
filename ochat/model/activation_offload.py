"""Activation offload: block inputs wait in pinned host memory from forward to backward.

    with offload.block(3): out = checkpoint(block, x)        # after the last block: offload.wait()

Copies in both directions share one side stream, so a host buffer is read before it is overwritten; streams wait for
each other on the device and the host never waits. While a block runs backward, the inputs of the one before it are
copied back. On a CPU a copy is a plain copy.
Why not torch's save_on_cpu: up to 2.11 the host waits for every copy; since then copies are queued in the computation's
own stream, which stops for them, and every one pins a new buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Key = tuple[int, int]  # block, and which of its inputs
MAX_INPUTS = 2  # of a block


class ActivationOffload:
    """The inputs that blocks keep for backward, in host buffers allocated once for each input of each block.

    Costs, T tokens of H elements, two inputs a block: 2 T H elements of host memory for each block; device memory for
    the inputs of two blocks; 2 T H elements to the host and back for each block.
    """

    def __init__(self) -> None:
        self.buffers: dict[Key, Tensor] = {}
        self._leaving: list[Tensor] = []  # held until the computation waits for their copies
        self._arriving: dict[Key, tuple[Tensor, torch.cuda.Event | None]] = {}  # with the end of its copy
        self._stream: torch.cuda.Stream | None = None

    def block(self, index: int) -> saved_tensors_hooks:
        """Within it, what autograd saves are the inputs of block `index`; blocks come in order."""
        self.wait()
        saved: list[Key] = []

        def pack(value: Tensor) -> Tensor | tuple[Key, torch.device]:
            if not value.numel():  # torch's checkpoint keeps one on the host
                return value
            saved.append((index, len(saved)))
            self._copy_out(saved[-1], value)
            return saved[-1], value.device

        def unpack(kept: Tensor | tuple[Key, torch.device]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._copy_back(*kept)

        return saved_tensors_hooks(pack, unpack)

    def wait(self) -> None:
        """Makes the computation's stream wait for pending copies to the host; their sources may then be reused."""
        if self._leaving and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._leaving.clear()

    def _copy_out(self, key: Key, value: Tensor) -> None:
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.buffers[key] = buffer
        self._arriving.pop(key, None)  # left by a backward that failed
        with self._side_stream(value.device):
            buffer.copy_(value, non_blocking=True)
        self._leaving.append(value)

    def _copy_back(self, key: Key, device: torch.device) -> Tensor:
        """The input on the device; starts the copies of the block before."""
        self._prefetch(key, device)
        value, arrived = self._arriving.pop(key)
        if arrived is not None:
            torch.cuda.current_stream(device).wait_event(arrived)
        for before in ((key[0] - 1, each) for each in range(MAX_INPUTS)):
            if before in self.buffers:
                self._prefetch(before, device)
        return value

    def _prefetch(self, key: Key, device: torch.device) -> None:
        if key in self._arriving:
            return
        with self._side_stream(device) as stream:
            value = self.buffers[key].to(device, non_blocking=True, copy=True)
            arrived = None if stream is None else torch.cuda.Event()
            if arrived is not None:
                arrived.record(stream)
            self._arriving[key] = value, arrived

    @contextmanager
    def _side_stream(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """The stream of copies, after all that the computation has queued; None on a CPU."""
        if device.type != "cuda":
            yield None
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield self._stream
