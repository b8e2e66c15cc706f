"""Command-line options that the benchmarks share.

parser("benchmarks.ops", "times the operators", "ops.csv")
`--device cpu --quick` is a dry run: tiny shapes, which show without a GPU that everything runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch


def parser(prog: str, description: str, file: str) -> argparse.ArgumentParser:
    """--out, the folder of `file`, --device, --quick, --seconds and --commit; a benchmark may add more."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    made.add_argument("--out", type=Path, required=True, help=f"the folder of {file}, to which rows are added")
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs")
    made.add_argument("--seconds", type=float, default=math.inf, help="groups not begun by then are skipped")
    made.add_argument("--commit", help="the commit that is measured, where there is no git")
    return made


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, why_quick: str, *for_cpu: str
) -> argparse.Namespace:
    """The options; makes the folder. Exits with usage for real shapes on a CPU (`why_quick` says why not), unless
    one of the options `for_cpu` is given, and for a missing GPU."""
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not (options.quick or any(getattr(options, name) for name in for_cpu)):
        parser.error(f"--device cpu takes --quick: {why_quick}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; the dry run is --device cpu --quick")
    options.out.mkdir(parents=True, exist_ok=True)
    return options
