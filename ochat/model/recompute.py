"""Selective recompute: backward repeats norms, RoPE and SwiGLU instead of keeping their results.

    ops = SelectiveRecompute(ochat_kernels.load("triton"))
    with ops.recomputing():
        y = block(x)  # no result of these operators is kept for backward; gradients are bitwise the same

Where autograd would save such a result, a saved-tensor hook saves the operator and its inputs, which are kept anyway:
the residual stream, or a product. Why not torch's create_selective_checkpoint_contexts: measured with the same
operators on torch 2.13 it keeps T H elements more a block (a whole operator's outputs or none of them, so the sum of
`add_rms_norm` cannot be kept without the norm), and its dispatch modes take the host four times as long.
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


class SelectiveRecompute:
    """The operators of `ops` that a block uses; outside `recomputing()` they are unchanged."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops
        # By storage, so that views are found too; weakly, because a new tensor may reuse the memory of a freed one.
        self._results: WeakKeyDictionary[torch.UntypedStorage, tuple[Recomputed, int]] | None = None

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Saves calls instead of results. Costs in backward, a block: for each norm 2 T H elements to move, for RoPE
        2 T (N + K) D, for SwiGLU 3 T F."""
        self._results = WeakKeyDictionary()
        try:
            with saved_tensors_hooks(self._pack, unpack):
                yield
        finally:
            self._results = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = self.ops.rms_norm(x, weight, eps)
        self._record((y,), self.ops.rms_norm, x, weight, eps)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = self.ops.add_rms_norm(x, residual, weight, eps)
        self._record((y,), self.ops.rms_norm, total, weight, eps)
        return y, total

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated = self.ops.rope(q, k, cos, sin)
        self._record(rotated, self.ops.rope, q, k, cos, sin)
        return rotated

    def swiglu(self, gate_up: Tensor) -> Tensor:
        y = self.ops.swiglu(gate_up)
        self._record((y,), self.ops.swiglu, gate_up)
        return y

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
