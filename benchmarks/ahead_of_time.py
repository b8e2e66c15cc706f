"""Compile recorded kernel launches for a GPU that is not present, and read from the binary what they need.

    with ochat_kernels.launch.record() as launches: ...   # launchers on meta tensors
    for kernel in compile_all(launches, 90): print(kernel.registers, faults(kernel))
It uses the JIT's own specialisation; a stub answers when Triton asks the driver which GPU it has.
"""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from ochat_kernels.launch import Launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

SHARED_KIB = {80: 163, 90: 227}  # shared memory that a block may ask for; a processor has 1 KiB more, a block costs 1
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one processor, the same on both
WORKERS = 2  # most of a compilation runs outside Python's lock
CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


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
    error: str = ""

    @property
    def registers_per_block(self) -> int:
        """Registers are given to a warp by 256."""
        return self.num_warps * -(-self.registers * 32 // 256) * 256

    @property
    def blocks_per_processor(self) -> int:
        """How many blocks a streaming multiprocessor holds at once."""
        shared = (SHARED_KIB[self.arch] + 1) * 1024 // (self.shared_bytes + 1024)
        return min(BLOCKS, WARPS // self.num_warps, REGISTERS // max(self.registers_per_block, 1), shared)


class _Card:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(launches: list[Launch], arch: int) -> list[CompiledKernel]:
    """Every distinct compilation among `launches`, in their order."""
    card: Any = _Card(arch)
    driver.set_active(card)
    with ThreadPoolExecutor(WORKERS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        pending = {}  # the JIT gives one object for launches that share a binary
        for launch in launches:
            compilation = _start(launch)
            pending.setdefault(id(compilation), (launch, compilation))
        return [_finish(launch, compilation, arch) for launch, compilation in pending.values()]


def faults(kernel: CompiledKernel) -> list[str]:
    """Why a GPU would refuse the kernel, or run it slowly."""
    found = []
    if kernel.error:
        found.append(f"does not compile: {kernel.error}")
    if kernel.stack_bytes and not is_tolerated(kernel):
        found.append(f"spills: {kernel.stack_bytes} bytes of stack a thread")
    if kernel.shared_bytes > SHARED_KIB[kernel.arch] * 1024:
        allowed = f"a block may have {SHARED_KIB[kernel.arch]} KiB on sm_{kernel.arch}"
        found.append(f"needs {kernel.shared_bytes / 1024:.1f} KiB of shared memory: {allowed}")
    return found


def is_tolerated(kernel: CompiledKernel) -> bool:
    """Whether spills are accepted: the norm's gradient for rows of more than 8192 elements that are not even rows in
    bf16, because fp32 sums leave too few registers. No model has such rows; they need only be correct."""
    configuration = kernel.configuration
    is_common = configuration.get("x") == configuration.get("weight") == "bf16" and not kernel.alignment
    return kernel.name == "rms_norm_bwd_kernel" and configuration["BLOCK_H"] == "16384" and not is_common


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
        kernel = compilation.result()
        return CompiledKernel(*facts, *_usage(kernel))
    except Exception as error:  # the compiler's own, the assembler's, or a kernel's assertion: all are the finding
        return CompiledKernel(*facts, error=f"{type(error).__name__}: {error}")


def _usage(kernel: Any) -> tuple[int, int, int, int]:
    """Registers and bytes of stack of a thread, bytes of shared memory of a block, bytes of the widest access."""
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [str(CUOBJDUMP), "--dump-resource-usage", cubin]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"REG:(\d+) STACK:(\d+)", listing)
    registers, stack = (max(int(numbers[i]) for numbers in functions) for i in (0, 1))
    accesses = re.findall(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", kernel.asm["ptx"])
    widest = max((int(vector or 1) * int(bits) // 8 for vector, bits in accesses), default=0)
    return registers, stack, kernel.metadata.shared, widest
