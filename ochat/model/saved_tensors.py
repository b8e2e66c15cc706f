"""What blocks keep for backward: less of it, by selective recompute, or in host memory, by activation offload.

    ops = SelectiveRecompute(ochat_kernels.load("triton"))
    with ops.recomputing():
        y = block(x)  # no result of these operators is kept for backward; gradients are bitwise the same
    with offload.block(3):
        y = checkpoint(block, x)  # x waits in pinned host memory; after the last block: offload.wait()

Where autograd would save the result of a norm, RoPE or SwiGLU, a saved-tensor hook saves the operator and its inputs,
which are kept anyway: the residual stream, or a product. Why not torch's create_selective_checkpoint_contexts: measured
with the same operators on torch 2.13 it keeps T H elements more a block (a whole operator's outputs or none of them, so
the sum of `add_rms_norm` cannot be kept without the norm), and its dispatch modes take the host four times as long.

Copies to the host and back share one side stream, so a host buffer is read before it is overwritten; streams wait for
each other on the device and the host never waits. While a block runs backward, the inputs of the one before it are
copied back. On a CPU a copy is a plain copy. Why not torch's save_on_cpu: up to 2.11 the host waits for every copy;
since then copies are queued in the computation's own stream, which stops for them, and every one pins a new buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ochat.model.fp8 import Fp8Rows

Key = tuple[int, int]  # block, and which of its inputs
MAX_INPUTS = 2  # of a block


class SelectiveRecompute:
    """The operators of `ops` that a block uses; outside `recomputing()` they are unchanged."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops
        # By storage, so that views are found too; weakly, because a new tensor may reuse the memory of a freed one.
        self._results: WeakKeyDictionary[torch.UntypedStorage, tuple[Recomputed, int]] | None = None

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Saves calls instead of results. Costs in backward, a block: for each norm 2 T H elements to move, for RoPE
        with the norms of q's and k's heads 2 T (N + 2K) D (without, nothing), for SwiGLU or GeGLU 3 T F."""
        self._results = WeakKeyDictionary()
        try:
            with saved_tensors_hooks(self._pack, unpack):
                yield
        finally:
            self._results = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        y = self.ops.rms_norm(x, weight, eps, offset)
        self._record((y,), self.ops.rms_norm, x, weight, eps, offset)
        return y

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        y, total = self.ops.add_rms_norm(x, residual, weight, eps, offset)
        self._record((y,), self.ops.rms_norm, total, weight, eps, offset)
        return y, total

    def rms_norm_fp8(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Fp8Rows:
        rows = Fp8Rows(*self.ops.rms_norm_fp8(x, weight, eps, offset))
        self._record((rows.values,), self.ops.rms_norm, x, weight, eps, offset)
        return rows

    def add_rms_norm_fp8(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
    ) -> tuple[Fp8Rows, Tensor]:
        *rows, total = self.ops.add_rms_norm_fp8(x, residual, weight, eps, offset)
        self._record((rows[0],), self.ops.rms_norm, total, weight, eps, offset)
        return Fp8Rows(*rows), total

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = self.ops.rope(q, k, cos, sin)
        self._record(rotated, self.ops.rope, q, k, cos, sin)
        return rotated

    def qkv_rope(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its results are kept, and are all of the product that is: as large as that, and nothing need be remade."""
        return self.ops.qkv_rope(qkv, cos, sin, num_heads, num_kv_heads)

    def qkv_norm_rope(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (qkv, q_weight, k_weight, cos, sin, num_heads, num_kv_heads, eps, offset)
        results = self.ops.qkv_norm_rope(*inputs)
        self._record(results, self.ops.qkv_norm_rope, *inputs)
        return results

    def swiglu(self, gate_up: Tensor) -> Tensor:
        y = self.ops.swiglu(gate_up)
        self._record((y,), self.ops.swiglu, gate_up)
        return y

    def geglu(self, gate_up: Tensor) -> Tensor:
        y = self.ops.geglu(gate_up)
        self._record((y,), self.ops.geglu, gate_up)
        return y

    def swiglu_fp8(self, gate_up: Tensor) -> Fp8Rows:
        rows = Fp8Rows(*self.ops.swiglu_fp8(gate_up))
        self._record((rows.values,), self.ops.swiglu, gate_up)
        return rows

    def geglu_fp8(self, gate_up: Tensor) -> Fp8Rows:
        rows = Fp8Rows(*self.ops.geglu_fp8(gate_up))
        self._record((rows.values,), self.ops.geglu, gate_up)
        return rows

    def _record(self, results: tuple[Tensor, ...], function: Callable[..., Any], *inputs: Any) -> None:
        if self._results is None:
            return
        call = Recomputed(function, [self._pack(x.detach()) if isinstance(x, Tensor) else x for x in inputs])
        for index, result in enumerate(results):
            self._results[result.untyped_storage()] = call, index

    def _pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        """What autograd saves in place of a tensor: the tensor, or a function that computes it."""
        call, index = (self._results or {}).get(tensor.untyped_storage(), (None, 0))
        if call is None:
            return tensor
        call.uses += 1
        size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return lambda: call.result(index).as_strided(size, stride, offset)


class Recomputed:
    """A call that is repeated once for all who ask for its results."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.uses = 0  # results that will be asked for
        self._results: tuple[Tensor, ...] | None = None

    def result(self, index: int) -> Tensor:
        """One of the results; all are held until the last use."""
        results = self._results
        if results is None:
            with torch.no_grad():
                out = self.function(*map(unpack, self.inputs))
            results = out if isinstance(out, tuple) else (out,)
        self.uses -= 1
        self._results = results if self.uses > 0 else None
        return results[index]


def unpack(saved: Any) -> Any:
    """The value that was packed."""
    return saved() if callable(saved) else saved


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
