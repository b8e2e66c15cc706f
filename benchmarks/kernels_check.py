"""Compile every kernel in every configuration that its launchers pick, for GPUs that need not be present.

    make kernels-check, or python -m benchmarks.kernels_check [--arch 80 90] [--out DIR] [--quick]
It fails for a kernel that does not compile, spills registers or needs more shared memory than a block may have, and
for one that no case of kernel_cases.py launches. `--out DIR` writes a CSV row per binary; `--quick`: one operator.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import ochat_kernels
import triton
from ochat_kernels.launch import INTERPRETED, Launch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from benchmarks.compiled import SHARED_KIB, CompiledKernel, compile_all
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
    """Whether spills are accepted: the norm's for rows of more than 8192 elements that are not even rows in bf16,
    because fp32 sums and an address for each element leave too few registers. No model has such rows; they need only be
    correct."""
    configuration = kernel.configuration
    is_common = configuration.get("x") == configuration.get("weight") == "bf16" and not kernel.alignment
    is_norm = kernel.name in ("rms_norm_fwd_kernel", "rms_norm_bwd_kernel")
    return is_norm and configuration["BLOCK_H"] == "16384" and not is_common


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
