"""`ochat doctor`: what this machine has for training, in one block to be copied into a report or a question.

A line a fact: a driver or a package that is missing says what that costs and how to get it. Changes nothing.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ochat import __version__
from ochat.console import next_command

EXTRAS = {  # of pyproject.toml, those that add something to a command
    "data": ("gguf", "pyarrow", "zstandard"),
    "report": ("plotly", "matplotlib", "scikit-learn", "scipy", "umap-learn"),
    "judge": ("openai",),
    "log": ("tensorboard", "wandb"),
    "quantized": ("bitsandbytes",),
}
DRIVER = Path("/proc/driver/nvidia/version")
OPEN_FILES = 4096  # many shards of data and weights are open at once
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "stack": resource.RLIMIT_STACK,
}
GIB = 2**30


@dataclass(frozen=True)
class DoctorOptions:
    """Prints what this machine has for training.

    Driver, GPUs, torch, kernels, packages, disk and limits, to be copied into a report.
    """


def main(_: DoctorOptions) -> None:
    """Prints the facts, aligned."""
    facts = [fact for part in (machine, gpus, kernels, packages, disks, limits) for fact in part()]
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"{name:<{width}}  {text}")
    next_command("ochat check CONFIG.toml")


def machine() -> Iterator[tuple[str, str]]:
    """Versions of ochat and Python, and the host's size."""
    yield "ochat", f"{__version__}, in {Path(__file__).parents[2]}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "system", platform.platform()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield "host", f"{len(os.sched_getaffinity(0))} CPU cores, {memory:,.0f} GiB of memory"


def gpus() -> Iterator[tuple[str, str]]:
    """Driver, torch with its libraries, and each GPU."""
    import torch

    driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "none: training runs on the CPU"
    from torch.cuda import nccl as nccl_library

    yield "nvidia driver", driver
    yield "torch", torch.__version__
    cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
    yield "cuda", f"{cuda}, cuDNN {cudnn}" if cuda else "none in this torch; with a GPU, install torch for CUDA"
    nccl = ".".join(map(str, nccl_library.version())) if cuda and torch.distributed.is_nccl_available() else ""
    yield "nccl", nccl or "none: processes exchange by gloo"
    if DRIVER.exists() and not torch.cuda.is_available():
        yield "gpu", "none that torch sees, though there is a driver; look at CUDA_VISIBLE_DEVICES and torch's CUDA"
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        kind = f"compute capability {card.major}.{card.minor}"
        yield f"gpu {number}", f"{card.name}, {card.total_memory / GIB:,.0f} GiB, {kind}"


def kernels() -> Iterator[tuple[str, str]]:
    """Triton, the compiler for a CPU's kernels, and who can compute attention."""
    import torch
    from ochat_kernels.compiled import has_compiler

    from ochat.model.attention.backends import BACKENDS

    yield "triton", version("triton") or "none: no kernels for a GPU; pip install triton"
    yield "C++ compiler", "yes" if has_compiler() else 'none: train.kernels = "compiled" needs g++ or clang++'
    yield "flash-attn", version("flash-attn") or "none; pip install flash-attn --no-build-isolation"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = {name: row.is_missing(device) for name, row in BACKENDS.items()}
    yield "attention", f"on {device.type}: {', '.join(name for name, why in missing.items() if not why)}"


def packages() -> Iterator[tuple[str, str]]:
    """Those of each extra, and how to get what is missing."""
    for extra, names in EXTRAS.items():
        found = {name: version(name) for name in names}
        text = ", ".join(f"{name} {number}" for name, number in found.items() if number)
        missing = [name for name, number in found.items() if not number]
        lack = f"no {', '.join(missing)}: pip install 'ochat-crlft[{extra}]'" if missing else ""
        yield f"extra {extra}", "; ".join(filter(None, (text, lack)))


def disks() -> Iterator[tuple[str, str]]:
    """Free space where runs, temporary files and shared memory are."""
    for name, folder in (
        ("here", Path.cwd()),
        ("temporary", Path(tempfile.gettempdir())),
        ("shared", Path("/dev/shm")),
    ):
        if folder.exists():
            use = shutil.disk_usage(folder)
            yield f"disk {name}", f"{folder}: {use.free / GIB:,.0f} of {use.total / GIB:,.0f} GiB free"


def limits() -> Iterator[tuple[str, str]]:
    """What this shell may use."""
    for name, which in LIMITS.items():
        most = resource.getrlimit(which)[0]
        note = (
            f"; raise it with ulimit -n {OPEN_FILES}"
            if which == resource.RLIMIT_NOFILE and 0 <= most < OPEN_FILES
            else ""
        )
        yield f"limit {name}", ("unlimited" if most == resource.RLIM_INFINITY else f"{most:,}") + note


def version(package: str) -> str:
    """Of an installed package; "" where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
