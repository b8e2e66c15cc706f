"""Inputs of blocks that wait in host memory from forward to backward, copied beside the computation.

    with host_inputs.of_block(3): out = checkpoint(block, x)        # after the last block: host_inputs.settle()
All copies to and from the host queue in one stream of their own, so a buffer of the host is read before it is written
again; streams wait for each other on the card, and the host for none. While a block goes backward, the inputs of the
one before it arrive. Without a card a copy is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Place = tuple[int, int]  # block, and which of its inputs
INPUTS = 2  # at most


class HostInputs:
    """What blocks keep for backward, in (pinned) buffers that are made once for each input of each block.

    Costs, T tokens of H elements, two inputs a block: 2 T H elements of the host for each block; of the card those of
    one block besides the one that goes backward; 2 T H to the host and back again a block.
    """

    def __init__(self) -> None:
        self._buffers: dict[Place, Tensor] = {}
        self._leaving: list[Tensor] = []  # held until the computation waits for their copies
        self._coming: dict[Place, tuple[Tensor, torch.cuda.Event | None]] = {}  # with the end of its copy
        self._stream: torch.cuda.Stream | None = None

    def of_block(self, index: int) -> saved_tensors_hooks:
        """Within it, what is saved for backward are the inputs of block `index`; blocks come in order."""
        self.settle()
        saved: list[Place] = []

        def send(value: Tensor) -> Tensor | tuple[Place, torch.device]:
            if not value.numel():  # torch's checkpoint keeps one on the host
                return value
            saved.append((index, len(saved)))
            self._send(saved[-1], value)
            return saved[-1], value.device

        def take(kept: Tensor | tuple[Place, torch.device]) -> Tensor:
            return kept if isinstance(kept, Tensor) else self._take(*kept)

        return saved_tensors_hooks(send, take)

    def settle(self) -> None:
        """What is computed from now on may overwrite the inputs that have left."""
        if self._leaving and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._leaving.clear()

    def _send(self, place: Place, value: Tensor) -> None:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[place] = buffer
        self._coming.pop(place, None)  # of a backward that was broken off
        with self._beside(value.device):
            buffer.copy_(value, non_blocking=True)
        self._leaving.append(value)

    def _take(self, place: Place, device: torch.device) -> Tensor:
        """The input, back on the device; those of the block before begin to come."""
        self._fetch(place, device)
        value, arrived = self._coming.pop(place)
        if arrived is not None:
            torch.cuda.current_stream(device).wait_event(arrived)
        for before in ((place[0] - 1, each) for each in range(INPUTS)):
            if before in self._buffers:
                self._fetch(before, device)
        return value

    def _fetch(self, place: Place, device: torch.device) -> None:
        if place in self._coming:
            return
        with self._beside(device) as stream:
            value = self._buffers[place].to(device, non_blocking=True, copy=True)
            self._coming[place] = value, _end_of(stream)

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """The stream of copies, after all that is queued in the computation's; None without a card."""
        if device.type != "cuda":
            yield None
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield self._stream


def _end_of(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    """What is queued in it so far."""
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event
