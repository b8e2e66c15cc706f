"""Compile every kernel in every configuration that its launchers pick, for GPUs that need not be present.

    make kernels-check, or python -m benchmarks.kernels_check [--arch 80 90] [--out DIR] [--quick]
It fails for a kernel that does not compile, spills registers or needs more shared memory than a block may have, and
for one that no case of kernel_cases.py launches. `--out DIR` writes a CSV row per binary; `--quick`: one operator.
It uses the JIT's own specialisation; a stub answers when Triton asks the driver which GPU it has.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import filterfalse, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ochat_kernels
import torch
import triton
from ochat_kernels.launch import INTERPRETED, Launch
from ochat_kernels.reference_fp8 import FP8
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.csv_file import CsvFile
from benchmarks.kernel_cases import CASES, note

PIPE_COLUMNS = 200  # width of a table that does not go to a terminal
FACTS = {  # heading -> a number of a kernel
    "registers": lambda kernel: kernel.registers,
    "stack bytes": lambda kernel: kernel.stack_bytes,
    "shared bytes": lambda kernel: kernel.shared_bytes,
    "widest access": lambda kernel: kernel.access_bytes,
    "blocks/SM": lambda kernel: kernel.blocks_per_processor,
}
SHARED_KIB = {80: 163, 90: 227}  # shared memory that a block may ask for; a processor has 1 KiB more, a block costs 1
REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one processor, the same on both
WORKERS = 2  # most of a compilation runs outside Python's lock
CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
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
        return " ".join(f"{k}={v}" for k, v in self.configuration.items() if k.isupper() and v != "False")


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


def main() -> None:
    """Exits with 1 when there is a fault, 2 for wrong usage."""
    options = _parse(sys.argv[1:])
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else PIPE_COLUMNS
    operators = list(CASES)[:1] if options.quick else list(CASES)
    launches = [launch for operator in operators for launch in note(operator)]
    missing = [] if options.quick else never_launched(launches)
    sys.exit(check(launches, options.arch[:1] if options.quick else options.arch, console, options.out, missing))


def check(
    launches: list[Launch], archs: list[int], console: Console, out: Path | None = None, missing: Iterable[str] = ()
) -> int:
    """Compiles, prints the table and what is wrong; 1 if anything is. `missing`: kernels that nothing launched."""
    start = time.monotonic()
    found = [compile_all(launches, arch) for arch in track(archs, "compiling", console=Console(stderr=True))]
    kernels = sorted((kernel for each in found for kernel in each), key=str)
    elapsed_s = time.monotonic() - start
    print_table(kernels, console)
    if out is not None:
        write_csv(kernels, out / f"kernels_triton{triton.__version__}.csv")
    wrong = [f"{name}: no case launches it; add one to benchmarks/kernel_cases.py" for name in missing]
    wrong += [f"{kernel} {fault}" for kernel in kernels for fault in faults(kernel)]
    for line in wrong:
        console.print(f"[red]✗[/red] {escape(line)}", soft_wrap=True)
    tolerated = sum(kernel.stack_bytes > 0 and is_tolerated(kernel) for kernel in kernels)
    spills = f"{tolerated} tolerated spills" if tolerated else "none spills"
    verdict = f"{len(wrong)} faults" if wrong else f"{spills}, all fit"
    what = f"triton {triton.__version__}: {len(launches)} launches, {len(kernels)} binaries: {verdict}"
    console.print(f"{what} ({elapsed_s:.1f} s, {elapsed_s / max(len(kernels), 1):.2f} s each)", soft_wrap=True)
    return 1 if wrong else 0


def never_launched(launches: list[Launch]) -> list[str]:
    """Kernels of the package that are in none of the launches."""
    modules = [importlib.import_module(f"ochat_kernels.{m.name}") for m in pkgutil.iter_modules(ochat_kernels.__path__)]
    defined = [v for m in modules for v in vars(m).values() if isinstance(v, triton.JITFunction)]
    names = {kernel.__name__ for kernel in defined if kernel.__name__.endswith("_kernel")}
    return sorted(names - {launch.kernel.__name__ for launch in launches})


def print_table(kernels: list[CompiledKernel], console: Console) -> None:
    """One row for all binaries of a kernel with the same warps and constants; `a-b` is the least and the most."""
    table = Table("kernel", "constants", "warps", "binaries", *FACTS, title="What the kernels need", box=None)
    key = lambda kernel: (kernel.name, kernel.num_warps, kernel.constants)  # noqa: E731
    for (name, warps, constants), members in groupby(sorted(kernels, key=key), key):
        rows = list(members)
        facts = [sorted({fact(kernel) for kernel in rows}) for fact in FACTS.values()]
        ranges = [str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}" for found in facts]
        style = "red" if any(map(faults, rows)) else None
        table.add_row(name, escape(constants), str(warps), str(len(rows)), *ranges, style=style)
    console.print(table)


def write_csv(kernels: list[CompiledKernel], path: Path) -> None:
    """One row a binary."""
    path.unlink(missing_ok=True)
    rows = CsvFile(path, ["triton", "kernel", "configuration", "alignment", "arch", "warps", *FACTS, "faults"])
    for each in kernels:
        row = {"triton": triton.__version__, "kernel": each.name, "configuration": each.settings, "arch": each.arch}
        row |= {"alignment": each.alignment, "warps": each.num_warps, "faults": "; ".join(faults(each))}
        rows.add(row | {name: fact(each) for name, fact in FACTS.items()})


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    archs = list(SHARED_KIB)
    parser.add_argument("--arch", type=int, nargs="+", choices=archs, default=archs, help="compute capabilities")
    parser.add_argument("--out", type=Path, help="a folder for the table as CSV")
    parser.add_argument("--quick", action="store_true", help="one operator, one architecture")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
