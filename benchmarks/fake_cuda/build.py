"""Build a fake CUDA device for a CUDA build of torch on a machine without a GPU, and print what a shell must export.

    eval "$(PYTHONPATH=.:kernels python -m benchmarks.fake_cuda.build /tmp/fake_cuda)"; python -m ochat train ...
Then torch sees one H200 (FAKE_CUDA_DEVICES=8: eight) whose kernels return at once and compute nothing. torch's
dispatch, caching allocator, streams, autograd, FSDP and Triton's compiler are the real ones, so crashes, host
synchronisations and memory use show. Values are zeros or leftovers, times are the host's own. Needs gcc and nm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
USERS = ("libc10_cuda", "libtorch_cuda", "libtorch_python", "libtorch_cpu", "libtorch_cuda_linalg", "libtorch_nvshmem")
RUNTIME = re.compile(r"(__)?(cuda|cublas|cusparse|nccl|cupti)[A-Za-z0-9_]*")  # whose functions are replaced
NVML = re.compile(rb"\bnvml[A-Z]\w+")  # torch opens this library and looks all of these up
DRIVER = re.compile(r"\bcu[A-Z][A-Za-z0-9]+(?:_v\d+)?\b")


def build(folder: Path, packages: Path) -> dict[str, str]:
    """The environment variables of a process that sees the fake CUDA device; `packages`: where torch is installed.

    Raises: FileNotFoundError where torch is no CUDA build, CalledProcessError where gcc fails, which says why.
    """
    found = next(packages.glob("nvidia/cu*/include/cuda_runtime_api.h"), None)
    if found is None:
        raise FileNotFoundError(f"{packages}/nvidia/cu*/include: no CUDA headers; install a CUDA build of torch")
    headers = [found.parent, packages / "triton" / "backends" / "nvidia" / "include"]  # the second has crt/
    folder.mkdir(parents=True, exist_ok=True)
    libraries = [packages / "torch" / "lib" / f"{name}.so" for name in USERS]
    wanted = {name for library in libraries if library.exists() for name in undefined(library)}
    runtime, driver = folder / "libfakecuda.so", folder / "libcuda.so.1"
    parts = [HERE / "runtime.c", HERE / "libraries.c", HERE / "log.c"]
    link(runtime, parts, {name for name in wanted if RUNTIME.fullmatch(name)}, headers)
    names = set(DRIVER.findall((headers[0] / "cuda.h").read_text("utf-8"))) | {n for n in wanted if DRIVER.match(n)}
    link(driver, [HERE / "driver.c"], names, headers)
    found_nvml = NVML.findall((packages / "torch" / "lib" / "libc10_cuda.so").read_bytes())
    link(folder / "libnvidia-ml.so.1", [], {name.decode() for name in found_nvml}, headers)
    return {"LD_PRELOAD": str(runtime), "LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}


def undefined(library: Path) -> list[str]:
    """Names that a shared library imports, without versions."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    return [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]


def link(out: Path, sources: list[Path], wanted: Iterable[str], headers: list[Path]) -> None:
    """A library of the sources; other functions that are `wanted` do nothing and return 0."""
    objects = [_compiled(source, out.parent, headers) for source in sources]
    command = ["nm", "--defined-only", *objects] if objects else ["true"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    made = {fields[2] for fields in map(str.split, listed.splitlines()) if len(fields) == 3 and fields[1] == "T"}
    rest = out.parent / f"{out.name}.c"
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(set(wanted) - made)), "utf-8")
    objects.append(_compiled(rest, out.parent, headers))
    subprocess.run(["gcc", "-shared", f"-Wl,-soname,{out.name}", "-o", out, *objects, "-lpthread"], check=True)


def _compiled(source: Path, folder: Path, headers: list[Path]) -> Path:
    target = folder / f"{source.name}.o"  # -w: a stand-in declares a library's function as it likes
    include = [f"-I{each}" for each in headers]
    subprocess.run(["gcc", "-O1", "-fPIC", "-w", *include, "-c", source, "-o", target], check=True)
    return target


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("which folder? python -m benchmarks.fake_cuda.build FOLDER")
    import torch  # not before it is needed: with the fake library preloaded it takes seconds

    try:
        variables = build(Path(sys.argv[1]).resolve(), packages=Path(torch.__file__).parents[1])
    except FileNotFoundError as problem:
        sys.exit(str(problem))
    for name, value in variables.items():
        inherited = os.environ.get(name, "") if name == "LD_LIBRARY_PATH" else ""
        print(f"export {name}={value}{':' + inherited if inherited else ''}")


if __name__ == "__main__":
    main()
