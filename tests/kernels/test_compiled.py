"""The check of compiled kernels: it passes on a good one, and names one that spills, one that does not compile, and
one that no case launches."""

import subprocess
import sys

import pytest

from benchmarks.compiled import CompiledKernel
from benchmarks.kernels_check import faults
from tests import tiny

BAD_KERNELS = """
import sys
import torch
import triton
import triton.language as tl
from ochat_kernels.launch import launch, record
from rich.console import Console
from benchmarks.kernels_check import check, never_launched


@triton.jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.debug_barrier()
    tl.store(x_ptr + (BLOCK - 1 - tl.arange(0, BLOCK)), x)


@triton.jit
def broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), nothing)


x = torch.empty(16384, device="meta")
with record() as launches:
    launch(spilling_kernel, (1,), {"x_ptr": x, "BLOCK": 1024})
    launch(spilling_kernel, (1,), {"x_ptr": x, "BLOCK": 16384}, num_warps=1)
    launch(broken_kernel, (1,), {"x_ptr": x, "BLOCK": 1024})
    launch(broken_kernel, (1,), {"BLOCK": 1024})
console = Console(width=200)
missing = [name for name in never_launched(launches) if name.startswith("glu")]
sys.exit(check(launches, [80], console, missing=missing))
"""


def run(tmp_path, *command, **variables):
    kept = {name: value for name, value in tiny.environment().items() if name != "TRITON_INTERPRET"}
    env = kept | {"TRITON_CACHE_DIR": str(tmp_path / "cache")} | variables
    return subprocess.run([sys.executable, *command], cwd=tiny.ROOT, env=env, capture_output=True, text=True)


def test_one_operator_on_one_card(tmp_path):
    result = run(tmp_path, "-m", "benchmarks.kernels_check", "--quick", "--arch", "90", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "none spills, all fit" in result.stdout
    (table,) = tmp_path.glob("kernels_triton*.csv")
    text = table.read_text()
    assert "glu_fwd_kernel" in text and "glu_bwd_kernel" in text and ",80," not in text


def test_what_is_wrong_is_named(tmp_path):
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    result = run(tmp_path, str(script))
    faulty = [line for line in result.stdout.splitlines() if line.startswith("✗")]
    assert result.returncode == 1, result.stdout + result.stderr
    assert any("spilling_kernel (x=fp32 BLOCK=16384; 1 warps; sm_80) spills:" in line for line in faulty)
    assert not any("BLOCK=1024; 4 warps; sm_80) spills" in line for line in faulty)
    assert sum("broken_kernel" in line and "does not compile" in line for line in faulty) == 2
    assert any("glu_fwd_kernel: no case launches it" in line for line in faulty)
    assert "nothing is not defined" in result.stdout


def test_the_interpreter_compiles_nothing(tmp_path):
    result = run(tmp_path, "-m", "benchmarks.kernels_check", TRITON_INTERPRET="1")
    assert result.returncode == 2 and "unset it" in result.stderr


@pytest.mark.parametrize(("arch", "fits"), [(80, False), (90, True)])
def test_shared_memory_is_the_cards(arch, fits):
    kernel = CompiledKernel("a_kernel", {}, "", arch, num_warps=4, shared_bytes=200 * 1024)
    assert bool(faults(kernel)) is not fits


def test_spills_are_tolerated_in_rows_that_no_model_has():
    def spilling(weight, alignment, block, name="rms_norm_bwd_kernel"):
        configuration = {"x": "bf16", "weight": weight, "BLOCK_H": block}
        return CompiledKernel(name, configuration, alignment, 90, num_warps=32, stack_bytes=8)

    assert faults(spilling("bf16", "", "16384"))
    assert not faults(spilling("fp32", "", "16384"))
    assert not faults(spilling("bf16", "H%16!=0", "16384"))
    assert faults(spilling("bf16", "H%16!=0", "8192"))
    assert not faults(spilling("bf16", "H%16!=0", "16384", "rms_norm_fwd_kernel"))
    assert faults(spilling("bf16", "H%16!=0", "16384", "glu_fwd_kernel"))


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared_kib", "blocks"),
    [
        (4, 32, 0, 16),  # of 64 warps
        (4, 40, 0, 12),  # 5120 registers a block, 65536 there are
        (8, 255, 0, 1),  # 65536 registers a block
        (1, 16, 0, 32),  # no more blocks than this
        (4, 32, 81, 2),  # and 1 KiB each, of 164
    ],
)
def test_blocks_that_fit_a_processor(num_warps, registers, shared_kib, blocks):
    kernel = CompiledKernel("a_kernel", {}, "", 80, num_warps, registers, shared_bytes=shared_kib * 1024)
    assert kernel.blocks_per_processor == blocks
