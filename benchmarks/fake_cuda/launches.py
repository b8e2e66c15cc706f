"""What the fake CUDA device was asked to do: every kernel, copy, fill, product and collective of a piece of program.

with launches.recorded() as found: trainer.step(number, batches)
launches.counts(found); launches.weight_sized(found, sizes)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any
from unittest import mock

from ochat.train import optim, sharding

KINDS = ("kernel", "triton_kernel", "copy", "fill", "product", "collective")
BYTES = (2, 4)  # of an element of a weight, or of its gradient
MICRO_BATCH, UPDATE = "micro-batch", "update"  # marks
# copies whose size the log lacks: of a list of tensors, as FSDP makes them, and of two or three by many threads
OF_LISTS = re.compile("chunk_cat|split_with_sizes|multi_tensor_apply.*(Copy|Unary|Binary|Pointwise)")
MANY_THREADS = 2**20


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """The lines of log.c, filled when the block ends. A mark stands where each micro-batch of a step of the Trainer
    begins, and where the optimizer's update does."""
    library, found = ctypes.CDLL(None), []
    with tempfile.NamedTemporaryFile() as file, contextlib.ExitStack() as stack:
        for module, name, mark in ((sharding, "begin_micro_batch", MICRO_BATCH), (optim, "update", UPDATE)):
            stack.enter_context(mock.patch.object(module, name, _marked(getattr(module, name), library, mark)))
        library.fake_cuda_log(file.name.encode())
        try:
            yield found
        finally:
            library.fake_cuda_log(None)
        found.extend(map(json.loads, Path(file.name).read_text("utf-8").splitlines()))


def _marked(function: Any, library: ctypes.CDLL, mark: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        library.fake_cuda_note(b'{"kind": "mark", "name": "%s"}\n', mark.encode())
        return function(*args, **kwargs)

    return run


def counts(found: list[dict[str, Any]]) -> dict[str, int]:
    """How many of each of KINDS."""
    kinds = Counter(each["kind"] for each in found)
    return {kind: kinds[kind] for kind in KINDS}


def weight_sized(found: list[dict[str, Any]], sizes: Set[int]) -> dict[str, int]:
    """The copies, fills and elementwise kernels (casts, sums) between the first mark and the update that have as many
    elements as a weight (`sizes`), and those whose size is not known: {name: how often}.

    Products, collectives, reductions and Triton's kernels are none of them.
    """
    marks = [i for i, each in enumerate(found) if each["kind"] == "mark"]
    micro_batches = found[marks[0] : marks[-1]]
    return dict(Counter(readable(each["name"]) for each in micro_batches if _is_weight_sized(each, sizes)))


def _is_weight_sized(each: dict[str, Any], sizes: Set[int]) -> bool:
    if each["kind"] in ("copy", "fill"):
        return any(each["bytes"] == size * width for size in sizes for width in BYTES)
    if each["kind"] != "kernel":
        return False
    is_large_cat = "CatArray" in each["name"] and each["blocks"] * each["threads"] >= MANY_THREADS
    return each["elements"] in sizes or is_large_cat or bool(OF_LISTS.search(each["name"]))


@functools.cache
def readable(name: str) -> str:
    """A kernel's name as C++ has it, and what it does, without the types."""
    plain = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout.strip()
    kernel = re.split("[<(]", plain.replace("(anonymous namespace)::", ""))[0].split("::")[-1].removeprefix("void ")
    does = re.search(r"<.*?(\w+_kernel_cuda|\w*Functor\w*)", plain)
    return f"{kernel}: {does[1]}" if does else kernel
