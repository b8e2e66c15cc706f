"""Operators whose results backward makes again instead of keeping them: those that move bytes and multiply nothing.

    ops = Remaking(ochat_kernels.load("triton"))
    with ops.remaking():
        y = block(x)  # its graph holds no norm's output, no turned q and k, no output of SwiGLU; gradients are the same
Where autograd would keep such a result it is given a recipe: the operator and its inputs, which are kept in the same
way. Most are kept anyway: the residual stream, a product. The same operator on the same values gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Remaking:
    """The operators of `ops` that a block uses; outside `remaking()`, those themselves."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops
        # by storage, so that views are found too; weakly, because a new tensor may get a dead one's place in memory
        self._results: WeakKeyDictionary[torch.UntypedStorage, tuple[Recipe, int]] | None = None

    @contextmanager
    def remaking(self) -> Iterator[None]:
        """Forward under it keeps recipes. Costs in backward, a block: a norm's 2 T H elements to move and its sums,
        twice; RoPE's 2 T (N + K) D and SwiGLU's 3 T F."""
        self._results = WeakKeyDictionary()
        try:
            with saved_tensors_hooks(self._pack, unpack):
                yield
        finally:
            self._results = None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = self.ops.rms_norm(x, weight, eps)
        self._note((y,), self.ops.rms_norm, x, weight, eps)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = self.ops.add_rms_norm(x, residual, weight, eps)
        self._note((y,), self.ops.rms_norm, total, weight, eps)
        return y, total

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turned = self.ops.rope(q, k, cos, sin)
        self._note(turned, self.ops.rope, q, k, cos, sin)
        return turned

    def swiglu(self, gate_up: Tensor) -> Tensor:
        y = self.ops.swiglu(gate_up)
        self._note((y,), self.ops.swiglu, gate_up)
        return y

    def _note(self, results: Sequence[Tensor], function: Callable[..., Any], *inputs: Any) -> None:
        if self._results is None:
            return
        recipe = Recipe(function, [self._pack(x.detach()) if isinstance(x, Tensor) else x for x in inputs])
        for place, result in enumerate(results):
            self._results[result.untyped_storage()] = recipe, place

    def _pack(self, tensor: Tensor) -> Tensor | Remade:
        """What autograd holds in place of a tensor: itself, or how to make it."""
        recipe, place = (self._results or {}).get(tensor.untyped_storage(), (None, 0))
        if recipe is None:
            return tensor
        recipe.uses += 1
        return Remade(recipe, place, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


class Recipe:
    """How to make an operator's results again, once for all that ask for them."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.uses = 0  # that are yet to come
        self._made: tuple[Tensor, ...] | None = None

    def make(self, place: int) -> Tensor:
        """One of the results; they are held until the last one who needs any has asked."""
        made = self._made
        if made is None:
            with torch.no_grad():
                result = self.function(*map(unpack, self.inputs))
            made = result if isinstance(result, tuple) else (result,)
        self.uses -= 1
        self._made = made if self.uses > 0 else None
        return made[place]


class Remade(NamedTuple):
    """A view of a result that is to be made."""

    recipe: Recipe
    place: int  # among the operator's results
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def unpack(held: Any) -> Any:
    """The tensor that `Remaking` packed; whatever else as it is."""
    if not isinstance(held, Remade):
        return held
    return held.recipe.make(held.place).as_strided(held.size, held.stride, held.offset)
