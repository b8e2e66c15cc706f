"""Laws of what a plan recommends: pytest tests/plan/test_forecast.py"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from ochat.config import BaseConfig, Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from ochat.model.config import ModelConfig
from ochat.plan import forecast, roofline
from ochat.plan.forecast import Run
from ochat.plan.gpus import CARDS
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128)
LLAMA_70B = ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128)
LLAMA_1B = ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True)


def make_run(model=LLAMA_8B, recompute: Any = "none", longest=4000, budget=8192, bins=64, **parallel) -> Run:
    config = Config(
        base=BaseConfig("base"), data=DataConfig("data", token_budget=budget, bins_per_step=bins),
        train=TrainConfig(recompute=recompute), parallel=ParallelConfig(**parallel),
    )  # fmt: skip
    return Run(model, config, Workload(LengthCounts.of(np.array([200, 600, longest])), 0.5), num_steps=100)


@pytest.mark.parametrize("recompute", ["auto", "none", "elementwise", "block"])
@pytest.mark.parametrize(("model", "gpus"), [(LLAMA_8B, 8), (LLAMA_1B, 1), (LLAMA_70B, 64)])
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_the_largest_budget_fits_and_the_next_does_not(model, gpus, card, recompute):
    run = make_run(model, recompute)
    cut = run.cut(gpus, 8)
    largest = forecast.largest_budget(run, card, cut)
    room = card.memory_gib * GIB
    cuts = [run.settled(dataclasses.replace(cut, token_budget=largest + more), room) for more in (0, 256)]
    memory = [run.memory(each).total for each in cuts]
    assert memory[1] > room
    assert memory[0] <= room or largest == 0


@pytest.mark.parametrize(("gpus", "card"), [(8, "H100"), (8, "H200"), (4, "H200"), (16, "A100-80")])
def test_the_recommended_budget_fits_holds_every_sequence_and_keeps_the_step(gpus, card):
    run = make_run(recompute="block")
    found = forecast.forecast(run, CARDS[card], gpus=gpus, nodes=1)
    best = found.best
    assert best is not None and found.fits
    assert run.memory(best).total <= CARDS[card].memory_gib * GIB
    assert 2 * 4000 <= best.token_budget <= found.largest_budget
    assert best.bins_per_step % gpus == 0
    assert best.token_budget * best.bins_per_step == pytest.approx(64 * 8192, rel=0.15)
    rate = roofline.predict(run.model, CARDS[card], run.workload, best).tokens_per_s
    assert rate >= 0.98 * found.speed.tokens_per_s
    assert found.run_seconds == 100 * found.speed.step_seconds


def test_auto_is_as_fast_as_the_best_policy_that_fits():
    """Each card has another: 8B on 8 GPUs of 80 GB, and of 141."""
    taken = set()
    for card in ("H100", "H200"):
        auto = forecast.forecast(make_run(recompute="auto"), CARDS[card], gpus=8, nodes=1)
        fitting = {policy: rate.tokens_per_s for policy, (use, rate) in auto.policies.items() if auto.has_room(use)}
        assert auto.speed.tokens_per_s == fitting[auto.recompute] == max(fitting.values())
        taken.add(auto.recompute)
    assert taken == {"elementwise", "none"}


def test_bins_hold_twice_the_longest_sequence_where_that_fits():
    roomy = forecast.forecast(make_run(longest=20000, recompute="block"), CARDS["H200"], gpus=8, nodes=1)
    assert roomy.best is not None and roomy.best.token_budget >= 40000


def test_no_smaller_budget_is_as_fast():
    run, card = make_run(LLAMA_1B, longest=500, budget=1024, bins=512), CARDS["H200"]
    best = forecast.forecast(run, card, gpus=1, nodes=1).best
    assert best is not None and best.token_budget > 1024

    def rate(budget: int) -> float:
        cut = run.cut(1, 8, budget, run.bins_for(budget, 1))
        return roofline.predict(run.model, card, run.workload, cut).tokens_per_s

    assert rate(best.token_budget // 2) < 0.98 * rate(65536) < rate(best.token_budget)


def test_what_does_not_fit_gets_a_remedy_that_works():
    small = dataclasses.replace(CARDS["A100-80"], memory_gib=40)
    alone = forecast.forecast(make_run(LLAMA_8B), small, gpus=1, nodes=1)
    assert not alone.fits and alone.best is None and alone.largest_budget == 0
    run, enough = make_run(LLAMA_8B), int(alone.advice.split()[1])
    assert alone.advice.startswith("use ")
    assert forecast.largest_budget(run, small, run.cut(enough, 8)) >= 4000
    assert forecast.largest_budget(run, small, run.cut(enough // 2, 8)) < 4000


@pytest.mark.parametrize(("gpus", "key", "value"), [(1, "offload", "optimizer"), (2, "reduce", "micro_batch")])
def test_settings_that_make_room_come_before_more_cards(gpus, key, value):
    """8B on one or two cards of 80 GB: the moments on the host, or gradients shared at once."""
    found = forecast.forecast(make_run(LLAMA_8B), CARDS["A100-80"], gpus=gpus, nodes=1)
    assert found.best is None
    assert found.advice.startswith(f'set train.recompute = "block" and parallel.{key} = "{value}": then up to')
    run = make_run(LLAMA_8B, "block", **{key: value})
    budget = int(found.advice.split("up to ")[1].split()[0].replace(",", ""))
    assert budget == forecast.largest_budget(run, CARDS["A100-80"], run.cut(gpus, gpus)) >= 4000


def test_recompute_is_the_first_remedy_and_doing_without_it_the_first_gain():
    tight = forecast.forecast(make_run(longest=30000, budget=32768), CARDS["H100"], gpus=8, nodes=1)
    assert tight.best is None and 'recompute = "block"' in tight.advice
    roomy = forecast.forecast(make_run(recompute="block"), CARDS["H200"], gpus=8, nodes=1)
    assert 'recompute = "none"' in roomy.advice


def test_a_step_too_small_for_its_longest_sequence_is_told_so():
    found = forecast.forecast(make_run(LLAMA_1B, longest=9000, bins=1), CARDS["H200"], gpus=8, nodes=1)
    assert found.best is None and "bins_per_step" in found.advice


def test_a_configured_shard_is_kept_where_it_fits_the_gpus():
    run = make_run(shard=8, replicate=2)
    assert run.cut(16, 8).shard == 8
    assert run.cut(4, 8).shard == 4
    assert make_run().cut(16, 8).shard == 16


def test_precision_and_time_of_the_update_reach_memory_and_speed():
    """8B in full on one card of 80 GB: 2 bytes of weights and 4 of moments a parameter, and no gradients."""
    wide = make_run(recompute="block", bins=1, budget=32768)
    optim = OptimConfig(clip=0.0, master_dtype="bfloat16", moment_dtype="bfloat16", in_backward=True)
    narrow = dataclasses.replace(wide, config=structs.replace(wide.config, optim=optim))
    assert (narrow.bins_for(8192, 1), wide.bins_for(8192, 1)) == (1, 4)
    found, other = (forecast.forecast(run, CARDS["H100"], gpus=1, nodes=1) for run in (narrow, wide))
    P = LLAMA_8B.num_parameters()
    assert (found.use.masters, found.use.moments) == (2 * P, 4 * P)
    assert found.fits and found.largest_budget > 16384 and found.best and found.best.bins_per_step == 1
    assert not other.fits and other.speed.optimizer == pytest.approx(2 * found.speed.optimizer)
    assert 'optim.master_dtype and optim.moment_dtype = "bfloat16" instead of the host' in other.advice
