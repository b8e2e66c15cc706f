"""Laws of the predicted speed: pytest tests/plan/test_roofline.py"""

import dataclasses

import numpy as np
import pytest

from ochat.config import LoraConfig
from ochat.model import lora
from ochat.model.config import ModelConfig
from ochat.plan import roofline
from ochat.plan.gpus import ATTENTION_LENGTHS, GPUS, attention_rate
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import Layout
from ochat.plan.roofline import Workload

MODELS = {
    "8B": ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128),
    "Llama-2-7B": ModelConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128),
    "3B": ModelConfig("llama", 128256, 3072, 8192, 28, 24, 8, 128, tie_embeddings=True),
    "1B": ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True),
    "135M": ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tie_embeddings=True),
    "norms everywhere": ModelConfig(
        "llama", 128256, 4096, 14336, 32, 32, 8, 128, norm_placement="both", qk_norm="head"
    ),
}
H200 = GPUS["H200"]


def predict(name="8B", length=4096, gpu=H200, share=1.0, imbalance=1.0, **changes):
    workload = Workload(LengthCounts.of(np.full(8, length)), share, 1.0, imbalance)
    layout = dataclasses.replace(Layout(16384, 8, attention="fa3"), **changes)
    return roofline.predict(MODELS[name], gpu, workload, layout)


def test_one_h200_is_predicted_within_ten_percent_of_its_ceiling():
    for name, length, recompute, ceiling in (
        ("8B", 4096, "none", 14_600), ("8B", 8192, "none", 13_500), ("8B", 4096, "block", 11_200),
        ("Llama-2-7B", 4096, "none", 16_200), ("3B", 4096, "none", 31_000), ("1B", 4096, "none", 82_000),
    ):  # fmt: skip
        predicted = predict(name, length, recompute=recompute)
        assert predicted.tokens_per_s == pytest.approx(ceiling, rel=0.1), name
        assert 0.4 < predicted.mfu < 0.8


def test_an_a100_is_predicted_above_what_was_published_and_not_far_above():
    predicted = predict("Llama-2-7B", gpu=GPUS["A100-80"]).tokens_per_s
    assert 4_641 < predicted < 1.25 * 4_641  # tokens/s of a GPU, 7B, bf16 without recompute


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", MODELS)
def test_no_prediction_exceeds_what_products_reach(name, gpu):
    for ranks in (1, 8, 64):
        layout = {"ranks": ranks, "shard": ranks, "bins_per_step": 2 * ranks, "token_budget": 65536}
        predicted = predict(name, gpu=gpu, **layout)
        assert predicted.mfu < gpu.matmul_tflops / gpu.peak_tflops
        assert predicted.tokens_per_step == 2 * ranks * 65536


def test_more_work_takes_longer():
    base = predict().step_seconds
    assert predict(share=0.3).step_seconds < base
    assert predict(length=8192).step_seconds > base
    assert predict("norms everywhere").step_seconds > base
    assert predict(imbalance=1.2).step_seconds == pytest.approx(base * 1.2, rel=0.02)
    assert predict(recompute="block").step_seconds > 1.2 * base
    assert base < predict(recompute="elementwise").step_seconds < 1.05 * base
    assert predict(bins_per_step=16).step_seconds > 1.9 * base


def test_rows_that_are_not_supervised_are_spared_the_last_blocks_products():
    model, (all_rows, half) = MODELS["8B"], (predict(share=share) for share in (1.0, 0.5))
    weights = 4096 * (4096 + 3 * 14336)
    assert all_rows.matmul == pytest.approx(8 * 6 * model.matmul_params() * 16384 / H200.matmul_tflops / 1e12)
    assert all_rows.matmul - half.matmul == pytest.approx(8 * 6 * weights * 8192 / H200.matmul_tflops / 1e12)
    assert half.attention == all_rows.attention and half.flops_per_step < all_rows.flops_per_step


def test_eight_gpus_are_at_most_eight_times_one_and_nodes_cost_more():
    one = predict(bins_per_step=1).tokens_per_s
    in_a_node = predict(bins_per_step=16, ranks=16, shard=16, gpus_per_node=16).tokens_per_s
    between = predict(bins_per_step=16, ranks=16, shard=16, gpus_per_node=1).tokens_per_s
    assert between < in_a_node <= 1.05 * 16 * one  # masters and casts are shared, so a little more is possible


def test_micro_batches_of_few_tokens_wait_for_the_host():
    assert predict("135M", token_budget=256).launches > 0
    assert predict("135M", token_budget=65536).launches == 0


def test_parts_are_all_of_a_step_and_none_is_negative():
    predicted = predict(ranks=8, shard=4, bins_per_step=16, recompute="block", imbalance=1.1, token_budget=256)
    assert min(getattr(predicted, name) for name in roofline.PARTS) >= 0
    totals = {"tokens_per_step", "flops_per_step", "peak_flops"}
    assert {*roofline.PARTS} | totals == {field.name for field in dataclasses.fields(predicted)}


def test_attention_of_short_documents_is_slower_and_known_rates_are_kept():
    for gpu in GPUS.values():
        rates = attention_rate(gpu, np.array([0, 1, 64, 512, *ATTENTION_LENGTHS, 10**6]))
        assert (np.diff(rates) >= 0).all() and rates[0] > 0
        np.testing.assert_allclose(rates[4:8], gpu.attention_tflops)
        np.testing.assert_allclose(attention_rate(gpu, np.array(ATTENTION_LENGTHS), "fa3"), gpu.flash_3_tflops)
    assert predict(attention="varlen").attention == predict(attention="auto").attention > predict().attention


def test_model_flops_are_those_of_the_model():
    lengths = np.array([5, 70, 900])
    workload = Workload(LengthCounts.of(lengths), 0.5)
    tokens = int(lengths.sum())
    exact = MODELS["8B"].flops_per_step(tokens, int((lengths**2).sum()), tokens // 2)
    predicted = roofline.predict(MODELS["8B"], H200, workload, Layout(tokens, 1))
    assert predicted.flops_per_step == pytest.approx(exact, rel=1e-2)


BETWEEN_NODES = {"ranks": 16, "shard": 16, "bins_per_step": 64, "token_budget": 256}  # so few tokens that little hides


def test_choices_of_sharding_cost_what_they_move():
    plain = predict(**BETWEEN_NODES)
    assert predict(**BETWEEN_NODES, reshard="step").communication < 0.5 * plain.communication
    each, halved = (predict(**BETWEEN_NODES, reduce="micro_batch", reduce_itemsize=size) for size in (4, 2))
    assert 1.5 * plain.communication < each.communication > halved.communication
    bus = 16 * MODELS["8B"].num_parameters() / 16 / roofline.HOST_BANDWIDTH
    assert predict(**BETWEEN_NODES, offload="optimizer").optimizer - plain.optimizer == pytest.approx(bus)


def test_offloaded_inputs_of_blocks_overlap_with_computation(monkeypatch):
    """Four micro-batches; what is left to see is what takes longer than its direction's computation."""
    block = {**BETWEEN_NODES, "recompute": "block"}
    inputs = 2 * 2 * 256 * 4096 * 32  # bytes: two of each block, in bf16
    slow, slower, fast = 1e9, 0.5e9, 1e15
    taken = {}
    for rate in (slow, slower, fast):
        monkeypatch.setattr(roofline, "HOST_BANDWIDTH", rate)
        taken[rate] = predict(**block, offload_activations=True).recompute - predict(**block).recompute
    assert taken[fast] == 0
    assert taken[slower] - taken[slow] == pytest.approx(4 * 2 * inputs * (1 / slower - 1 / slow))
    assert 0 < taken[slow] < 4 * 2 * inputs / slow


def test_narrow_masters_and_moments_cost_what_they_move():
    P, copy, narrow = MODELS["8B"].num_parameters(), H200.copy_bandwidth, {"master_itemsize": 2, "state_itemsize": 2}
    wide, thin = predict(bins_per_step=1), predict(bins_per_step=1, **narrow)
    half, sums = predict(bins_per_step=1, state_itemsize=2), predict(bins_per_step=2, **narrow)  # sums are fp32
    for speed, moved in ((wide, 34), (half, 26), (thin, 16), (sums, 20)):  # with the copies of fp32 masters
        assert speed.optimizer == pytest.approx(moved * P / copy)
    assert wide.memory_bound == thin.memory_bound  # there are no casts
    bus = predict(bins_per_step=1, **narrow, offload="optimizer").optimizer - thin.optimizer
    assert bus == pytest.approx(8 * P / roofline.HOST_BANDWIDTH)


def test_gradients_are_added_up_within_their_products_and_whole_ones_reduced_once():
    P, copy = MODELS["8B"].num_parameters(), H200.copy_bandwidth

    def moved(**changes):
        """Bytes a parameter of a step."""
        return predict(**changes).memory_bound * copy / P

    one = moved(bins_per_step=1)
    assert moved(bins_per_step=3) == pytest.approx(3 * one + 2 * 8)
    assert moved(bins_per_step=1, recompute="block") == pytest.approx(one + 6)  # a cast, and again in recompute
    eight = {"bins_per_step": 32, "ranks": 8, "shard": 8}  # four micro-batches: each casts an eighth and copies twice
    gathers = 4 * 2 * (6 / 8 + 4)
    assert moved(**eight, reduce="step") == pytest.approx(4 * one + gathers + 3 * 8 + 8)
    assert moved(**eight, reduce="micro_batch") == pytest.approx(4 * one + gathers + 4 * 8 + 3 * 12 / 8)


def test_frozen_weights_save_a_third_of_the_products():
    model, full = MODELS["8B"], predict(length=1024, share=0.5)
    adapters = lora.num_parameters(model, LoraConfig(rank=16))
    ours = predict(length=1024, share=0.5, lora=LoraConfig(rank=16))
    assert adapters == 41_943_040  # as PEFT counts them
    share = 2 / 3 + adapters / model.matmul_params()
    assert ours.matmul == pytest.approx(full.matmul * share, rel=1e-3)  # what the last block is spared apart
    assert ours.attention == full.attention and ours.optimizer < 0.01 * full.optimizer
    assert ours.mfu < full.mfu


def test_fp8_of_one_h200_is_what_the_parts_make_of_it():
    """Two of three products at the rate of e4m3, less what quantising moves; nothing else changes."""
    narrow = {"bins_per_step": 1, "master_itemsize": 2, "state_itemsize": 2, "in_backward": True}
    bf16, fp8 = (predict("8B", share=0.5, linear=linear, **narrow) for linear in ("bf16", "fp8"))
    assert 15_500 < fp8.tokens_per_s < 18_500 and 1.15 < fp8.tokens_per_s / bf16.tokens_per_s < 1.35
    assert fp8.matmul / bf16.matmul == pytest.approx(1 / 3 + 2 / 3 * H200.matmul_tflops / H200.fp8_tflops, rel=1e-6)
    quantising = fp8.memory_bound - bf16.memory_bound
    assert 0.015 < quantising / fp8.step_seconds < 0.05
    same = ("attention", "head", "launches", "communication", "optimizer")
    assert all(getattr(fp8, part) == getattr(bf16, part) for part in same)


def test_fp8_of_adapters_narrows_every_product_of_a_frozen_weight():
    adapters = {"lora": LoraConfig(rank=16), "bins_per_step": 1}
    bf16, fp8 = (predict("8B", linear=linear, **adapters) for linear in ("bf16", "fp8"))
    own = 6 * lora.num_parameters(MODELS["8B"], LoraConfig(rank=16)) * 16384 / H200.matmul_tflops / 1e12
    ratio = H200.matmul_tflops / H200.fp8_tflops
    assert fp8.matmul == pytest.approx((bf16.matmul - own) * ratio + own, rel=1e-6)


def test_a_card_without_fp8_is_predicted_as_with_bf16_products():
    bf16, fp8 = (predict("8B", gpu=GPUS["A100-80"], linear=linear) for linear in ("bf16", "fp8"))
    assert fp8.matmul == bf16.matmul
