"""Does this machine work, and what does it reach: versions, one kernel, products in a burst and sustained, a copy.

    PYTHONPATH=.:kernels python -m benchmarks.smoke --out DIR [--device cpu --quick]; smoke.read(DIR).tflop_per_s
Products slow down on a hot card, so a rate of 20 of them says little of a step: DIR/device.json has both.
"""

from __future__ import annotations

import importlib
import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import ochat_kernels
import torch

from benchmarks import command_line, csv_file, timing
from benchmarks.timing import Ceilings

FILE = "device.json"
PACKAGES = ("torch", "triton", "numpy", "numba", "flash-attn", "flash_attn_3", "flash-attn-4", "liger-kernel")
MODULES = ("flash_attn", "flash_attn_interface", "flash_attn.cute", "transformers", "liger_kernel", "cut_cross_entropy")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=power.draw,clocks.sm,temperature.gpu,power.limit", "--format=csv,noheader")


def read(folder: Path, device: torch.device) -> Ceilings | None:
    """The ceilings that an earlier run wrote there, of this device; None: there are none."""
    if not (folder / FILE).is_file():
        return None
    found = json.loads((folder / FILE).read_text("utf-8"))
    if found["device"] != csv_file.stamp(device)["device"]:
        return None
    return Ceilings(found["burst_tflop_per_s"], found["copy_gb_per_s"])


def versions(device: torch.device) -> dict[str, Any]:
    """Of what is installed; of modules that cannot be imported the reason."""
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"cudnn": torch.backends.cudnn.version(), "gib": round(properties.total_memory / timing.GIB, 1)}
        found |= {"multiprocessors": properties.multi_processor_count}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as problem:  # a package for another CUDA raises anything
            found[f"no {name}"] = timing.reason(problem)
    return found


def kernel_error(device: torch.device) -> float:
    """Of one Triton kernel, compiled and run here, from its definition."""
    x, weight = torch.randn(64, 512, device=device), torch.randn(512, device=device)
    got, expected = (ochat_kernels.load(name).rms_norm(x, weight, 1e-5) for name in ("triton", "reference"))
    return timing.max_error([got], [expected])


def main(arguments: list[str] | None = None) -> int:
    parser = command_line.parser("benchmarks.smoke", "versions and the device's ceilings", FILE)
    options = command_line.parse(parser, arguments, "a CPU has other ceilings")
    device = torch.device(options.device)
    found: dict[str, Any] = csv_file.stamp(device, options.commit) | {"versions": versions(device)}
    found["kernel_error"] = kernel_error(device)
    burst, copy = timing.measure_ceilings(device, quick=options.quick)
    found |= {"burst_tflop_per_s": burst, "copy_gb_per_s": copy}
    found["sustained_tflop_per_s"] = timing.sustained_tflops(device, quick=options.quick)
    found["after_it"] = csv_file.output_of(*NVIDIA_SMI)  # watts, clock, degrees, the limit of watts
    (options.out / FILE).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1), flush=True)
    return 0 if found["kernel_error"] < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
