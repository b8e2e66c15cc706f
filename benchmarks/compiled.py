"""Kernels compiled for GPUs that need not be present, and what their binaries say of them.

    for kernel in compile_all(launches, arch=90): kernel.registers, kernel.blocks_per_processor
It uses the JIT's own specialisation; a stub answers when Triton asks the driver which GPU it has.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from ochat_kernels.launch import Launch
from ochat_kernels.reference_fp8 import FP8
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.sass import TOOLS

SHARED_KIB = {80: 163, 90: 227}  # shared memory that a block may ask for; a processor has 1 KiB more, a block costs 1
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one processor, the same on both
WORKERS = 2  # most of a compilation runs outside Python's lock
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64", FP8: "e4m3"}
FP8_ARCH = 90  # no earlier one converts to e4m3


@dataclass(frozen=True)
class CompiledKernel:
    """One binary, or the compiler's message (`error`)."""

    name: str
    configuration: dict[str, str]  # dtypes of pointers, constants
    alignment: str  # which integers and pointers are no multiples of 16
    arch: int
    num_warps: int
    registers: int = 0  # a thread
    stack_bytes: int = 0  # a thread; what does not fit into registers is spilled here
    shared_bytes: int = 0  # a block
    access_bytes: int = 0  # the widest access of a thread to global memory
    cubin: Path | None = None
    error: str = ""

    @property
    def blocks_per_processor(self) -> int:
        """How many blocks a streaming multiprocessor holds at once; a warp gets registers in units of 256."""
        registers = self.num_warps * -(-self.registers * 32 // 256) * 256
        shared = (SHARED_KIB[self.arch] + 1) * 1024 // (self.shared_bytes + 1024)
        return min(BLOCKS, WARPS // self.num_warps, REGISTERS // max(registers, 1), shared)

    def __str__(self) -> str:
        facts = [self.settings, self.alignment, f"{self.num_warps} warps", f"sm_{self.arch}"]
        return f"{self.name} ({'; '.join(filter(None, facts))})"

    @property
    def settings(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.configuration.items())

    @property
    def constants(self) -> str:
        """The constants that are set, without dtypes."""
        return " ".join(f"{k}={v}" for k, v in self.configuration.items() if k.isupper() and v not in ("", "False"))


def compile_all(launches: list[Launch], arch: int) -> list[CompiledKernel]:
    """Every distinct compilation among `launches` that a GPU of this architecture can run, in their order."""
    stub: Any = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(stub)  # what Triton asks of a driver before it compiles
    with ThreadPoolExecutor(WORKERS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        pending = {}  # the JIT gives one object for launches that share a binary
        for launch in launches if arch >= FP8_ARCH else filterfalse(needs_fp8, launches):
            compilation = _start(launch)
            pending.setdefault(id(compilation), (launch, compilation))
        return [_finish(launch, compilation, arch) for launch, compilation in pending.values()]


def needs_fp8(launch: Launch) -> bool:
    """Whether a kernel reads or writes e4m3."""
    return any(isinstance(value, Tensor) and value.dtype == FP8 for value in launch.arguments.values())


def describe(launch: Launch) -> tuple[dict[str, str], str]:
    """What distinguishes a compilation: the dtypes of pointers and the constants, by name; then the integers and
    pointers that are no multiples of 16, are 1, or need 64 bits."""
    configuration, alignment = {}, []
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name, parameter.default)
        name = parameter.name.removesuffix("_ptr")
        if isinstance(value, Tensor):
            configuration[name] = DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        elif parameter.is_constexpr or value is None:
            configuration[name] = str(value)
        if not parameter.is_constexpr and not parameter.do_not_specialize:
            alignment += _peculiarities(name, value)
    return configuration, " ".join(alignment)


def _peculiarities(name: str, value: Any) -> list[str]:
    if isinstance(value, Tensor):
        return [f"{name}%16!=0"] if value.data_ptr() % 16 else []
    if type(value) is not int:
        return []
    if value == 1:
        return [f"{name}=1"]
    return [f"{name}%16!=0"] * bool(value % 16) + [f"{name}:int64"] * (value >= 2**31)


def _start(launch: Launch) -> Any:
    """A future kernel, or the reason why it cannot even be asked for."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    try:
        return launch.kernel.warmup(**launch.arguments, **options, grid=(1,))
    except Exception as error:
        return error


def _finish(launch: Launch, compilation: Any, arch: int) -> CompiledKernel:
    facts = (launch.kernel.__name__, *describe(launch), arch, launch.num_warps)
    try:
        if isinstance(compilation, Exception):
            raise compilation
        kernel = compilation.result() if hasattr(compilation, "result") else compilation  # made by an earlier call
        return CompiledKernel(*facts, *_usage(kernel))
    except Exception as error:  # the compiler's own, the assembler's, or a kernel's assertion: all are the finding
        return CompiledKernel(*facts, error=f"{type(error).__name__}: {error}")


def _usage(kernel: Any) -> tuple[int, int, int, int, Path]:
    """Registers and bytes of stack of a thread, bytes of shared memory of a block, bytes of the widest access; the
    binary."""
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"REG:(\d+) STACK:(\d+)", listing)
    registers, stack = (max(int(numbers[i]) for numbers in functions) for i in (0, 1))
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", kernel.asm["ptx"])
    widest = max((int(vector or 1) * int(bits) // 8 for vector, bits in accesses), default=0)
    return registers, stack, kernel.metadata.shared, widest, Path(cubin)
