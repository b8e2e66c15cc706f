"""Compiles every kernel in every configuration that its launchers pick, for cards that need not be there: `make
kernels-check`, or

    python -m benchmarks.kernels_check [--arch 80 90] [--out DIR] [--quick]
It fails for a kernel that does not compile, spills registers, or asks for more shared memory than a block may have,
and for a kernel that no case of kernel_cases.py launches. `--out DIR` keeps every binary's row as CSV; `--quick`
tries the machinery on one operator and one card.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import pkgutil
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path

import ochat_kernels
import triton
from ochat_kernels.launch import INTERPRETED, Launch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from benchmarks.ahead_of_time import SHARED_KIB, WARPS, CompiledKernel, compile_all, faults, is_tolerated
from benchmarks.kernel_cases import CASES, note

PIPE_COLUMNS = 200  # of a table that does not go to a terminal: a log wraps nothing
FACTS = {  # heading -> a number of a kernel
    "registers": lambda kernel: kernel.registers,
    "registers/block": lambda kernel: kernel.registers_per_block,
    "stack bytes": lambda kernel: kernel.stack_bytes,
    "shared bytes": lambda kernel: kernel.shared_bytes,
    "widest access": lambda kernel: kernel.access_bytes,
    "blocks/SM": lambda kernel: kernel.blocks_per_processor,
    "occupancy %": lambda kernel: round(100 * kernel.blocks_per_processor * kernel.num_warps / WARPS),
}
WORDS = ("kernel", "configuration")


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
    kernels = compile_with_progress(launches, archs, console)
    elapsed_s = time.monotonic() - start
    print_table(kernels, console)
    if out is not None:
        write_csv(kernels, out / f"kernels_triton{triton.__version__}.csv")
    wrong = [f"{name}: no case launches it; add one to benchmarks/kernel_cases.py" for name in missing]
    wrong += [f"{_title(kernel)} {fault}" for kernel in kernels for fault in faults(kernel)]
    for line in wrong:
        console.print(f"[red]✗[/red] {escape(line)}", soft_wrap=True)
    tolerated = sum(kernel.stack_bytes > 0 and is_tolerated(kernel) for kernel in kernels)
    spills = f"{tolerated} tolerated spills" if tolerated else "none spills"
    verdict = f"{len(wrong)} faults" if wrong else f"{spills}, all fit"
    what = f"triton {triton.__version__}: {len(launches)} launches, {len(kernels)} binaries: {verdict}"
    console.print(f"{what} ({elapsed_s:.1f} s, {elapsed_s / max(len(kernels), 1):.2f} s each)", soft_wrap=True)
    return 1 if wrong else 0


def compile_with_progress(launches: list[Launch], archs: list[int], console: Console) -> list[CompiledKernel]:
    """Every distinct compilation, by kernel, configuration and card."""
    kernels = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        for arch in archs:
            task = progress.add_task(f"sm_{arch}", total=None)
            kernels += compile_all(launches, arch, partial(_advance, progress, task))
    return sorted(kernels, key=_order)


def _advance(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def never_launched(launches: list[Launch]) -> list[str]:
    """Kernels of the package that are in none of the launches."""
    modules = [importlib.import_module(f"ochat_kernels.{m.name}") for m in pkgutil.iter_modules(ochat_kernels.__path__)]
    defined = [v for m in modules for v in vars(m).values() if isinstance(v, triton.JITFunction)]
    names = {kernel.__name__ for kernel in defined if kernel.__name__.endswith("_kernel")}
    return sorted(names - {launch.kernel.__name__ for launch in launches})


def print_table(kernels: list[CompiledKernel], console: Console) -> None:
    """One row for all binaries of a configuration, whatever alignment and card; `a-b` is the least and the most."""
    table = Table(title="What the kernels need", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in (*WORDS, "warps", "binaries", *FACTS):
        table.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=heading == "kernel")
    for (name, num_warps), members in groupby(kernels, lambda kernel: (kernel.name, kernel.num_warps)):
        members = list(members)
        shared = set.intersection(*(set(kernel.configuration.items()) for kernel in members))
        for _, rows in groupby(members, _configuration):
            rows = list(rows)
            words = [name, escape(_brief(dict(set(rows[0].configuration.items()) - shared))), str(num_warps)]
            facts = [_range([fact(kernel) for kernel in rows]) for fact in FACTS.values()]
            table.add_row(*words, str(len(rows)), *facts, style="red" if any(map(faults, rows)) else None)
    console.print(table)


def write_csv(kernels: list[CompiledKernel], path: Path) -> None:
    """One row a binary; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["triton", *WORDS, "alignment", "arch", "warps", *FACTS, "faults"])
        for kernel in kernels:
            words = [kernel.name, _configuration(kernel), kernel.alignment, kernel.arch, kernel.num_warps]
            facts = (fact(kernel) for fact in FACTS.values())
            rows.writerow([triton.__version__, *words, *facts, "; ".join(faults(kernel))])


def _configuration(kernel: CompiledKernel) -> str:
    return " ".join(f"{name}={value}" for name, value in kernel.configuration.items())


def _order(kernel: CompiledKernel) -> tuple:
    return kernel.name, kernel.num_warps, _configuration(kernel), kernel.arch, kernel.alignment


def _brief(configuration: dict[str, str]) -> str:
    """Names by their dtype, or the dtype alone where all have one; then what is absent, and constants."""
    dtypes: dict[str, list[str]] = {}
    constants = []
    for name, value in sorted(configuration.items()):
        if value == "None":
            constants.append(f"no {name}")
        elif name.islower():
            dtypes.setdefault(value, []).append(name)
        elif value != "False":
            constants.append(name if value == "True" else f"{name}={value}")
    groups = [f"{dtype} {' '.join(names)}" for dtype, names in sorted(dtypes.items())]
    return " ".join([*(dtypes if len(dtypes) == 1 else groups), *constants])


def _title(kernel: CompiledKernel) -> str:
    alignment = [kernel.alignment] if kernel.alignment else []
    facts = [_configuration(kernel), *alignment, f"{kernel.num_warps} warps", f"sm_{kernel.arch}"]
    return f"{kernel.name} ({'; '.join(facts)})"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cards = list(SHARED_KIB)
    parser.add_argument("--arch", type=int, nargs="+", choices=cards, default=cards, help="compute capabilities")
    parser.add_argument("--out", type=Path, help="a folder for the table as CSV")
    parser.add_argument("--quick", action="store_true", help="one operator and one card")
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
