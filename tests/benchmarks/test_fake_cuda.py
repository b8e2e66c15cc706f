"""The fake CUDA device: its libraries do what their sources say, and the plan is what torch's allocator saw on it."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import csv_file, step_cases
from benchmarks.fake_cuda import build, launches, steps
from benchmarks.step_cases import Case
from ochat.plan.gpus import GPUS
from ochat.plan.memory import CONTEXT_BYTES, GIB, NCCL_BYTES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fake_cuda.csv"
# once a step an embedding's gradient becomes zero where no token was
ONCE = {"1 x vectorized_elementwise_kernel: FillFunctor"}
# where blocks are recomputed to save memory, each use casts: weights have no copies
OF_CASTS = {"vectorized_elementwise_kernel: bfloat16_copy_kernel_cuda"}
# what FSDP itself copies: shards into the buffer that is gathered, cast on the way; weights out of it; gradients into
# the buffer that is reduced; and where each micro-batch reduces, sums of shards. Each fills the embedding's gradient
OF_FSDP = {
    "vectorized_elementwise_kernel: FillFunctor",
    "vectorized_elementwise_kernel: CUDAFunctor_add",
    "multi_tensor_apply_kernel: CopyFunctor",
    "multi_tensor_apply_kernel: UnaryOpFunctor",
    "split_with_sizes_copy_out_contiguous_no_cast_kernel",
    "chunk_cat_cuda_kernel",
}


@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("nm")), reason="needs gcc and nm")
def test_what_is_wanted_and_not_made_does_nothing_and_what_is_taken_from_others_is_known(tmp_path):
    source = tmp_path / "source.c"
    source.write_text("int made(void) { return 7; } int caller(void) { extern int wanted(void); return wanted(); }\n")
    build.link(tmp_path / "lib.so", [source], {"wanted", "made", "never_called"}, [tmp_path])
    library = ctypes.CDLL(str(tmp_path / "lib.so"))
    assert (library.made(), library.wanted(), library.caller(), library.never_called()) == (7, 0, 0, 0)
    source.write_text("int made(void) { extern int cudaOfOthers(int); return cudaOfOthers(1); }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "other.so", source], check=True)
    names = build.undefined(tmp_path / "other.so")
    assert "cudaOfOthers" in names and "made" not in names
    assert [name for name in names if build.RUNTIME.fullmatch(name)] == ["cudaOfOthers"]


def test_without_a_cuda_build_or_the_device_nothing_is_made(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="install a CUDA build of torch"):
        build.build(tmp_path / "out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["steps", "--out", str(tmp_path / "out.csv")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA device"):
        steps.main()
    assert not list(tmp_path.iterdir())


def check(row: dict[str, str]) -> None:
    """Nothing waits, and nothing has a weight's size but what is allowed. On one process the plan without its allowance
    is within 1 % of the tensors' peak; with it there is room for them and for CUDA's own context, which the fake device
    lacks. Under FSDP each stream keeps its own memory: the plan is within 3 % of what the allocator reserved."""
    options, processes = tuple(row["options"].split()), int(row["processes"])
    case = Case(row["model"], int(row["token_budget"]), int(row["bins_per_step"]), options=options)
    allowed = OF_FSDP if processes > 1 else OF_CASTS if "--train.recompute=block" in options else set()
    found = set(row["weight_sized"].split("; ")) - ONCE - {"", "none"}
    assert {each.partition(" x ")[2] for each in found} <= allowed
    assert row["waits"] == "0"
    use = step_cases.predict(case, GPUS["H200"], processes).use
    allocated, reserved = float(row["allocated_gib"]), float(row["reserved_gib"])
    if processes == 1:
        assert (use.total - use.allowance) / GIB == pytest.approx(allocated, rel=0.01)
        assert use.total / GIB > allocated + CONTEXT_BYTES / GIB
        assert reserved < 1.07 * allocated
    else:
        assert (use.total - CONTEXT_BYTES - NCCL_BYTES) / GIB == pytest.approx(reserved, rel=0.03)


@pytest.mark.parametrize(
    "row", csv_file.read(RESULTS), ids=lambda row: f"{row['model']}-{row['recompute']}-{row['token_budget']}"
)
def test_the_plan_is_what_torchs_allocator_saw(row):
    check(row)
    assert not row["host_ms"] or float(row["host_ms"]) < float(row["predicted_step_ms"])  # "": the machine was busy


@pytest.mark.parametrize(
    ("option", "more_gib", "most_kernels"),
    [("--loss.dynamic=eaft", 0, 4 * 4), ("--optim.ema=0.999", 4 * 1_235_814_400 / GIB, 146)],
)
def test_weights_that_learn_and_the_average_take_no_further_pass(option, more_gib, most_kernels):
    """Products and Triton's kernels, which alone read logits, are as many as without, and memory is the same, or that
    of fp32 weights more. Torch's small kernels: a few a micro-batch, of which there are four, or one a parameter."""
    rows = {row["options"]: row for row in csv_file.read(RESULTS) if is_small(row)}
    plain, row = rows[""], rows[option]
    assert [row[kind] for kind in launches.KINDS[1:]] == [plain[kind] for kind in launches.KINDS[1:]]
    assert int(row["kernel"]) - int(plain["kernel"]) <= most_kernels
    assert float(row["allocated_gib"]) - float(plain["allocated_gib"]) == pytest.approx(more_gib, abs=0.002)


def is_small(row: dict[str, str]) -> bool:
    return (row["model"], row["token_budget"], row["processes"]) == ("Llama-3.2-1B", str(steps.ODD), "1")


@pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt")
def test_what_has_as_many_elements_as_a_weight_is_found_by_name():
    add = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EEEEviT0_T1_"
    kernel = {"kind": "kernel", "name": add, "blocks": 384, "threads": 128}
    copy = {"kind": "copy", "name": "device to device"}
    cat = {"kind": "kernel", "name": "CatArrayBatchedCopy", "threads": 512, "elements": -1}
    of_weights = [
        *({"kind": "mark", "name": launches.MICRO_BATCH}, kernel | {"elements": 6000}, copy | {"bytes": 12000}),
        *(kernel | {"elements": 6000}, copy | {"bytes": 24000}, cat | {"blocks": 5000}),
        *({"kind": "product", "m": 60, "n": 100, "k": 1}, {"kind": "triton_kernel", "name": "adamw", "elements": 6000}),
    ]
    smaller = [kernel | {"elements": 5999}, copy | {"bytes": 6000}, cat | {"blocks": 5}]
    update = [{"kind": "mark", "name": launches.UPDATE}, kernel | {"elements": 6000}]
    found = launches.weight_sized([kernel | {"elements": 6000}, *of_weights, *smaller, *update], {6000})
    assert found == {
        "vectorized_elementwise_kernel: CUDAFunctor_add": 2, "device to device": 2, "CatArrayBatchedCopy": 1
    }  # fmt: skip
    assert launches.counts(of_weights) == {
        "kernel": 3, "triton_kernel": 1, "copy": 2, "fill": 0, "product": 1, "collective": 0
    }  # fmt: skip


def test_every_case_was_measured():
    assert len(csv_file.read(RESULTS)) == len(steps.CASES)
