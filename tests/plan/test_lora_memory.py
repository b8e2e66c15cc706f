"""The memory and the speed that a plan predicts for adapters: pytest tests/plan/test_lora_memory.py"""

import dataclasses

import numpy as np
import pytest

from ochat.config import LoraConfig
from ochat.model import lora
from ochat.model.config import ModelConfig
from ochat.model.transformer import RECOMPUTE
from ochat.plan import memory_lora, roofline
from ochat.plan.gpus import GPUS
from ochat.plan.layout import Layout
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload
from tests.fake_step import FakeStep

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128)
FEW_BLOCKS = dataclasses.replace(LLAMA_8B, num_layers=4)
SEEN_ON_24_GB = 23.6  # GiB
TOLERANCE = 0.01  # the first block, and what few tokens' rows take, are followed roughly


@pytest.fixture
def derived_only(monkeypatch):
    """Without the allowance, and without logits: fake operators make none."""
    for name in ("CONTEXT_BYTES", "NCCL_BYTES", "FRAGMENTATION"):
        monkeypatch.setattr(memory_lora, name, 0.0)
    monkeypatch.setattr(memory_lora, "chunk_bytes", lambda *_: 0)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("settings", [LoraConfig(rank=16), LoraConfig(rank=64, targets=("q_proj", "v_proj"))])
def test_what_backward_keeps_is_what_the_model_keeps(recompute, settings):
    at = Layout(4096, supervised=1024, recompute=recompute)
    counted = FakeStep(FEW_BLOCKS, 4096, recompute, settings, supervised=1024).saved_bytes()
    assert memory_lora.saved_bytes(FEW_BLOCKS, at, settings) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_the_peak_of_a_step_is_the_one_predicted(recompute, derived_only):
    settings = LoraConfig(rank=16)
    use = memory_lora.predict(FEW_BLOCKS, Layout(8192, supervised=8192, recompute=recompute), settings)
    peak = FakeStep(FEW_BLOCKS, 8192, recompute, settings).peak_bytes(2)
    assert use.total - use.moments == pytest.approx(peak, rel=TOLERANCE)


def test_8b_trains_on_a_card_of_24_gb():
    """With room for a micro-batch of 4096 tokens, all of them supervised."""
    use = memory_lora.predict(LLAMA_8B, Layout(4096, 8, "block", supervised=4096), LoraConfig(rank=16))
    assert 2 * LLAMA_8B.num_parameters() / GIB < use.total / GIB < SEEN_ON_24_GB


def test_frozen_weights_save_a_third_of_the_products():
    workload = Workload(LengthCounts.of(np.full(100, 1024)), supervised_share=0.5)
    full = roofline.predict(LLAMA_8B, GPUS["H200"], workload, Layout(16384, 8))
    adapters = lora.num_parameters(LLAMA_8B, LoraConfig(rank=16))
    ours = roofline.predict(LLAMA_8B, GPUS["H200"], workload, Layout(16384, 8, adapters=adapters))
    assert adapters == 41_943_040  # as PEFT counts them
    share = 2 / 3 + adapters / LLAMA_8B.matmul_params()
    assert ours.matmul == pytest.approx(full.matmul * share, rel=1e-3)  # what the last block is spared apart
    assert ours.attention == full.attention and ours.optimizer < 0.01 * full.optimizer
    assert ours.mfu < full.mfu
