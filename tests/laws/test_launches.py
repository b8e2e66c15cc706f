"""What a step asks of the fake CUDA device: of a weight's size only products, no wait, the memory that was planned, no
more launches than before.

make fake-cuda
"""

import os

import pytest

from benchmarks import csv_file
from benchmarks.fake_cuda import launches, steps
from tests.benchmarks.test_fake_cuda import RESULTS, check

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif("libfakecuda" not in os.environ.get("LD_PRELOAD", ""), reason="needs the fake CUDA device"),
]
CASES = {case.title + f", {case.processes} processes": i for i, case in enumerate(steps.CASES) if steps.is_odd(case)}


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_a_micro_batch_neither_casts_nor_copies_nor_adds_a_weight(index):
    """And more launches than in the committed row mean that a change costs: where it should, renew the row."""
    row = {name: str(value) for name, value in steps.row_of(index).items()}
    check(row)
    before = csv_file.read(RESULTS)[index]
    assert {kind: row[kind] for kind in launches.KINDS if int(row[kind]) > int(before[kind])} == {}, before
