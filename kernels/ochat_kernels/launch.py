"""Start every Triton kernel: on the GPU, in Triton's interpreter, or only recorded for a compiler's check.

    TRITON_INTERPRET=1 (before the import) runs kernels on CPU tensors, slowly; `with record() as launches:` runs none.
Launchers describe what a kernel needs; only this file starts one and picks a device and a stream.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once too, when a kernel is defined
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNKNOWN_CARD_PROCESSORS = 132  # those of an H100 and H200


class Launch(NamedTuple):
    """One noted launch: everything that decides what would be compiled."""

    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]  # run-time arguments and constants by the kernel's names
    num_warps: int
    num_stages: int


_noted: ContextVar[list[Launch] | None] = ContextVar("noted", default=None)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within it launches are added to the list that it yields and not run; launchers then take meta tensors."""
    launches: list[Launch] = []
    token = _noted.set(launches)
    try:
        yield launches
    finally:
        _noted.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], *, num_warps: int = 4, num_stages: int = 1
) -> None:
    """Starts `kernel` over `grid` programs on the current stream of its tensors' GPU (none for an empty grid); waits
    for nothing."""
    if 0 in grid:
        return
    noted = _noted.get()
    if noted is not None:
        noted.append(Launch(kernel, arguments, num_warps, num_stages))
        return
    with _card_of(arguments):
        # fused multiply-adds: Triton's default, which it means to change
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


def check_floats(name: str, tensor: Tensor, dims: int | None = None) -> None:
    """ValueError unless `tensor` is fp32, bf16 or fp16, of `dims` dimensions, and where a kernel can reach it."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} is {tensor.dtype}: expected float32, bfloat16 or float16")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {dims} dimensions")
    check_device(name, tensor)


def check_device(name: str, tensor: Tensor) -> None:
    """ValueError for a tensor on a device that kernels cannot run on."""
    kind = "cpu" if INTERPRETED else "cuda"
    if tensor.device.type != kind:
        hint = "" if INTERPRETED else '; on a CPU use load("reference"), or set TRITON_INTERPRET=1 to debug'
        raise ValueError(f"{name} is on {tensor.device}: the Triton kernels expect {kind} tensors{hint}")


def check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    """ValueError unless `tensor` has the shape, dtype and device of `model`."""
    if tensor.shape != model.shape or tensor.dtype != model.dtype or tensor.device != model.device:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: expected the same as {model_name}, "
            f"{model.dtype} {tuple(model.shape)} on {model.device}"
        )


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU; those of an H200 without one."""
    if device.type != "cuda":
        return UNKNOWN_CARD_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _card_of(arguments: dict[str, Any]) -> AbstractContextManager[Any]:
    """Triton launches on the current device, so make that of the tensors current."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
