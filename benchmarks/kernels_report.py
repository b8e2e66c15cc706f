"""What each kernel costs as two models launch it in bf16, compiled for sm_90: the committed results/kernels.csv.

    python -m benchmarks.kernels_report   # part of make kernels-check; a minute, no GPU
It rewrites the file and says which rows changed. It fails for more than 3 % of growth in instructions or bytes an
element, and where fewer warps run at once: look at it, then commit the new report. sass.py says how they are counted.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import triton

from benchmarks import sass
from benchmarks.compiled import WARPS, CompiledKernel, compile_all
from benchmarks.csv_file import CsvFile, Row, read
from benchmarks.kernel_cases import MODELS, representative
from benchmarks.kernels_check import never_launched

FILE = Path(__file__).parent / "results/kernels.csv"
NAMES = ("Llama-3-8B", "Llama-3.2-1B")
ARCH = 90
GROWTH = 0.03
SQUARE_TILES = {"quantize_transposed_kernel"}  # BLOCK is both sides
KEY = ("kernel", "model")
COLUMNS = [*KEY, "constants", "warps", "registers", "warps_at_once", "instructions", "bytes", "triton"]


def main() -> None:
    """Exits with 1 where a kernel costs more, or has no row."""
    launches = {name: representative(MODELS[name]) for name in NAMES}
    missing = never_launched([launch for each in launches.values() for launch in each])
    for name in missing:
        print(f"{name}: no row in {FILE.name}; launch it in representative() of benchmarks/kernel_cases.py")
    changed, costs = update(FILE, make_rows({name: compile_all(each, ARCH) for name, each in launches.items()}))
    print(
        "\n".join(
            ["what changed in benchmarks/results/kernels.csv:", *changed] if changed else [f"{FILE.name}: as before"]
        )
    )
    if costs:
        print("\n".join(["✗ these cost more than before; look at them, then commit the new report:", *costs]))
    sys.exit(1 if costs or missing else 0)


def make_rows(kernels: dict[str, list[CompiledKernel]]) -> list[Row]:
    """Those of the first binary of each kernel, by the names of models."""
    rows = {}
    for model, compiled in kernels.items():
        for kernel in compiled:
            if (kernel.name, model) not in rows:
                rows[kernel.name, model] = _row(kernel, model)
    return [rows[key] for key in sorted(rows)]


def _row(kernel: CompiledKernel, model: str) -> Row:
    assert kernel.cubin is not None, f"{kernel}: {kernel.error}"
    parts = sass.count(kernel.cubin, elements(kernel))
    facts = {"kernel": kernel.name, "model": model, "constants": kernel.constants, "triton": triton.__version__}
    facts |= {"warps": str(kernel.num_warps), "registers": str(kernel.registers)}
    facts["warps_at_once"] = f"{kernel.blocks_per_processor * kernel.num_warps} of {WARPS}"
    facts["instructions"] = " + ".join(f"{part.instructions:.2f}" for part in parts)
    facts["bytes"] = " + ".join(f"{part.num_bytes:.2f}" for part in parts)
    return {name: facts[name] for name in COLUMNS}


def elements(kernel: CompiledKernel) -> float:
    """What a thread holds at a time: its share of a tile, whose sides are the constants BLOCK... and ROWS (BLOCK_R is
    the part of a head that does not turn, BLOCK_D a whole head). A kernel of pairs, which has a HALF, holds both of
    each; its loop is that over heads."""
    constants = {name: int(value) for name, value in kernel.configuration.items() if value.isdecimal()}
    names = [name for name in constants if name in ("BLOCK", "ROWS") or name.startswith("BLOCK_")]
    tile = math.prod(constants[name] for name in names if name not in ("BLOCK_R", "BLOCK_D"))
    if kernel.name in SQUARE_TILES:
        tile *= tile
    if "HALF" in constants:
        tile *= 2
    return tile / (32 * kernel.num_warps)


def compare(old: list[Row], new: list[Row]) -> tuple[list[str], list[str]]:
    """(what changed, what of it costs), a line each."""
    before = {tuple(row[name] for name in KEY): row for row in old}
    changed, costs = [], []
    for row in new:
        was = before.pop(tuple(row[name] for name in KEY), None)
        if was is None:
            changed.append(f"{row['kernel']} ({row['model']}): new")
            continue
        differing = [name for name in COLUMNS if row[name] != was[name]]
        if differing:
            what = ", ".join(f"{name} {was[name]} -> {row[name]}" for name in differing)
            line = f"{row['kernel']} ({row['model']}): {what}"
            changed.append(line)
            costs += [line] * _costs(was, row)
    changed += [f"{kernel} ({model}): gone" for kernel, model in before]
    return changed, costs


def _costs(was: Row, row: Row) -> bool:
    grown = any(_total(row[name]) > _total(was[name]) * (1 + GROWTH) for name in ("instructions", "bytes"))
    return grown or int(row["warps_at_once"].split()[0]) < int(was["warps_at_once"].split()[0])


def _total(parts: str) -> float:
    return sum(map(float, parts.split(" + ")))


def update(path: Path, rows: list[Row]) -> tuple[list[str], list[str]]:
    """Rewrites the report; what `compare` says of the one before."""
    found = compare(read(path) if path.is_file() else [], rows)
    path.unlink(missing_ok=True)
    file = CsvFile(path, COLUMNS)
    for row in rows:
        file.add(row)
    return found


if __name__ == "__main__":
    main()
