"""What a step asks of the fake CUDA device: of a weight's size only products, no wait, the memory that was planned, no
more launches than before. And that torch's own attention reaches its kernels there.

make fake-cuda
"""

import os

import pytest
import torch

from benchmarks import csv_file
from benchmarks.fake_cuda import launches, steps
from ochat.model.attention.packed import PackedAttention
from ochat.model.attention.sdpa import Scores
from tests.benchmarks.test_fake_cuda import RESULTS, check

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif("libfakecuda" not in os.environ.get("LD_PRELOAD", ""), reason="needs the fake CUDA device"),
]
OF_TORCH = {"varlen": "flash_bwd", "sdpa": "flash_bwd", "flex": ""}  # in a kernel's name; inductor's are not recorded
CASES = {case.title + f", {case.processes} processes": i for i, case in enumerate(steps.CASES) if steps.is_odd(case)}


@pytest.mark.parametrize("index", CASES.values(), ids=CASES)
def test_a_micro_batch_neither_casts_nor_copies_nor_adds_a_weight(index):
    """And more launches than in the committed row mean that a change costs: where it should, renew the row."""
    row = {name: str(value) for name, value in steps.row_of(index).items()}
    check(row)
    before = csv_file.read(RESULTS)[index]
    assert {kind: row[kind] for kind in launches.KINDS if int(row[kind]) > int(before[kind])} == {}, before


@pytest.fixture
def without_cudnn():
    """torch's SDPA prefers cuDNN on Hopper, which is not simulated."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("backend", OF_TORCH)
@pytest.mark.parametrize("window", [None, 100])
def test_torchs_attention_runs_with_its_own_dispatch_and_gradient(without_cudnn, backend, window):
    """Of 8B's heads, in shapes; values do not exist here."""
    lengths = [300, 1, 900, 847]
    leaves = [torch.empty(2048, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8)]
    q, k, v = (x.requires_grad_() for x in leaves)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    attend = PackedAttention(cu_seqlens, max(lengths), backend, lengths, [window])
    with launches.recorded() as found:
        out = attend(0, q, k, v, Scores(window))
        gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert any(OF_TORCH[backend] in each["name"] for each in found)
