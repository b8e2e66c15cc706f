"""What a step asks of the fake CUDA device: of a weight's size only products, no wait, the memory that was planned, no
more launches than before.

make fake-cuda
"""

import os

import pytest

from benchmarks import csv_file
from benchmarks.fake_cuda import launches, steps
from tests.benchmarks.test_fake_cuda import RESULTS, check_memory

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif("libfakecuda" not in os.environ.get("LD_PRELOAD", ""), reason="needs the fake CUDA device"),
]
CASES = {case.title + f", {case.processes} processes": i for i, case in enumerate(steps.CASES) if steps.is_odd(case)}
# an embedding's gradient is zero where no token was
ALLOWED = {"vectorized_elementwise_kernel: FillFunctor"}
# where blocks are recomputed to save memory, each use casts: weights have no copies
OF_CASTS = {"vectorized_elementwise_kernel: bfloat16_copy_kernel_cuda"}
# what FSDP itself copies: shards into the buffer that is gathered, cast on the way; weights out of it; gradients into
# the buffer that is reduced; and where each micro-batch reduces, sums of shards
OF_FSDP = {
    "vectorized_elementwise_kernel: CUDAFunctor_add",
    "multi_tensor_apply_kernel: CopyFunctor",
    "multi_tensor_apply_kernel: UnaryOpFunctor",
    "split_with_sizes_copy_out_contiguous_no_cast_kernel",
    "chunk_cat_cuda_kernel",
}


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_a_micro_batch_neither_casts_nor_copies_nor_adds_a_weight(index):
    """And more launches than in the committed row mean that a change costs: where it should, renew the row."""
    row = {name: str(value) for name, value in steps.row_of(index).items()}
    check_memory(row)
    assert row["waits"] == "0"
    found = {name.partition(" x ")[2] for name in row["weight_sized"].split("; ") if name != "none"}
    case, allowed = steps.CASES[index], ALLOWED
    if case.processes > 1:
        allowed = ALLOWED | OF_FSDP
    if "--train.recompute=block" in case.options:
        allowed = ALLOWED | OF_CASTS
    assert found <= allowed, row["weight_sized"]
    before = csv_file.read(RESULTS)[index]
    assert {kind: row[kind] for kind in launches.KINDS if int(row[kind]) > int(before[kind])} == {}, before
