"""Frozen weights in NF4 with double quantisation, through bitsandbytes: 4.127 bits a number (QLoRA, arXiv 2305.14314).

    packing = Packing(rows=(4096, 1024, 1024), columns=4096)      # q, k and v, which are one linear of ours
    stored = torch.cat([section for _, section in packing.quantize(parts, torch.bfloat16)])
    y = linear(x, stored, bias, packing)                          # x (T, in): as with packing.dequantize(stored)

A number is one of 16 levels times the largest of its block of 64. That scale has 8 bits, as its difference from the
part's mean scale, of which 256 share an fp32 scale. Each part is quantised alone, as bitsandbytes does with the linears
of a Hugging Face folder. A weight is then one tensor of bytes, in the dtype of the computation so that FSDP moves it as
it is: of each part the levels, the scales, the scales' scales, their mean.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ochat.errors import ConfigError

BLOCK = 64  # numbers that share a scale
SCALES = 256  # scales that share one
ALIGN = 128  # bytes: where each section begins


@dataclass(frozen=True)
class Packing:
    """How the bytes of a weight (sum(rows), columns) lie."""

    rows: tuple[int, ...]  # of its parts
    columns: int

    @property
    def nbytes(self) -> int:
        return sum(map(sum, map(self._sections, self.rows)))

    @property
    def numel(self) -> int:
        """Numbers of the whole weight."""
        return sum(self.rows) * self.columns

    def quantize(
        self, parts: Iterable[Tensor], dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[int, Tensor]]:
        """(offset, (n,) of `dtype`) of each section of the stored weight, from its parts, which may come one at a time
        and are rounded to `dtype` first. Costs: one part in `dtype` on the device; on a CPU several in fp32."""
        offset = 0
        for part in parts:
            flat = part.to(device, dtype).flatten()
            packed, state = library().quantize_4bit(  # zeros change no scale
                F.pad(flat, (0, -flat.numel() % BLOCK)), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
            )
            del flat
            scales = torch.cat([state.state2.absmax, state.offset[None]])
            for section in (packed, state.absmax, scales):
                content = section.flatten().view(torch.uint8)
                stored = F.pad(content, (0, -content.numel() % ALIGN)).view(dtype)
                yield offset, stored
                offset += stored.numel()

    def dequantize(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight (sum(rows), columns) in `dtype`. Costs: reads 0.52 bytes a number, and 4 for each 64 twice."""
        content, out = stored.view(torch.uint8), stored.new_empty(self.numel, dtype=dtype)
        pieces = iter(content.split([size for rows in self.rows for size in self._sections(rows)]))
        for target in out.split([rows * self.columns for rows in self.rows]):
            blocks = -(-target.numel() // BLOCK)
            levels, scales, shared = next(pieces)[:, None], next(pieces)[:blocks], next(pieces).view(torch.float32)
            groups = -(-blocks // SCALES)
            code = _code_of_scales(stored.device)
            scales = library().dequantize_blockwise(scales, absmax=shared[:groups], code=code, blocksize=SCALES)
            scales += shared[groups]
            _dequantize_levels(levels[: blocks * BLOCK // 2], scales, target)
        return out.view(-1, self.columns)

    def _sections(self, rows: int) -> tuple[int, int, int]:
        """Bytes of a part's levels, scales, and scales of scales with their mean."""
        blocks = -(-rows * self.columns // BLOCK)
        sizes = blocks * BLOCK // 2, blocks, 4 * (-(-blocks // SCALES) + 1)
        return tuple(-(-size // ALIGN) * ALIGN for size in sizes)  # type: ignore[return-value]


def linear(x: Tensor, stored: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
    """x @ weight.T + bias for x (T, in), the stored weight (out, in) and a frozen bias (out,): (T, out).

    Costs: as a frozen linear, and the weight is dequantised into x's dtype for each product, 2 + 0.6 bytes a number in
    bf16. Keeps neither x nor the dequantised weight.
    """
    return _Linear.apply(x, stored, bias, packing)  # type: ignore[return-value]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, bias: Tensor | None, packing: Packing) -> Tensor:
        ctx.packing = packing
        ctx.save_for_backward(stored)  # under FSDP backward gathers it again
        return F.linear(x, packing.dequantize(stored, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (stored,) = ctx.saved_tensors
        return dy @ ctx.packing.dequantize(stored, dy.dtype), None, None, None


def check(device: torch.device) -> None:
    """Quantises a small weight on the device and reads it back. Raises: ConfigError where bitsandbytes is missing, or
    does not work there."""
    whole = torch.randn(BLOCK, 2 * BLOCK, generator=torch.Generator().manual_seed(0))
    packing = Packing((BLOCK,), 2 * BLOCK)
    library()
    try:
        stored = torch.cat([section for _, section in packing.quantize([whole], torch.bfloat16, device)])
        error = (packing.dequantize(stored, torch.bfloat16).cpu() - whole).abs().max()
    except (RuntimeError, NotImplementedError, AttributeError) as failure:
        problem = f"{failure}".strip().splitlines()[0] if f"{failure}".strip() else repr(failure)
    else:
        if error <= 0.16 * whole.abs().max():  # half the widest gap between levels is 0.152
            return
        problem = f"a number of {whole.abs().max():.3g} at most came back {error:.3g} off"
    raise ConfigError(
        f"base.quantize = 'nf4': bitsandbytes does not work on {device} ({problem}); `python -m bitsandbytes` says "
        "more. Install the version for this CUDA, or set base.quantize = 'none'"
    )


@functools.cache
def library() -> ModuleType:
    """bitsandbytes.functional. Raises: ConfigError where it is not installed.

    Its import would fetch a kernel that is not used here from a hub, where the package `kernels` is installed, and warn
    where it is not: it does not see that package.
    """
    seen, log = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
    sys.modules["kernels"], log.disabled = None, True  # type: ignore[assignment]
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ConfigError(
            f"base.quantize = 'nf4' needs bitsandbytes ({error}): pip install 'ochat-crlft[quantized]'"
        ) from None
    finally:
        log.disabled = False
        del sys.modules["kernels"]
        if seen is not None:
            sys.modules["kernels"] = seen
    return functional


def _dequantize_levels(levels: Tensor, scales: Tensor, target: Tensor) -> None:
    """Writes into target (n,) what levels (ceil(n / 64) 32, 1) and their fp32 scales stand for."""
    n = 2 * levels.numel()
    state = library().QuantState(scales, torch.Size((n,)), None, BLOCK, "nf4", target.dtype)
    if target.is_cuda and target.numel() == n:
        library().dequantize_4bit(levels, state, out=target)
    else:  # a CPU's kernel has no `out`
        target.copy_(library().dequantize_4bit(levels, state).flatten()[: target.numel()])


@functools.cache
def _code_of_scales(device: torch.device) -> Tensor:
    """(256,) fp32: what 8 bits of a scale stand for."""
    return library().create_dynamic_map().to(device)
