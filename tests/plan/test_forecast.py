"""Laws of a forecast: pytest tests/plan/test_forecast.py"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import predictions
from benchmarks.step_cases import Case, draw_lengths
from ochat import config as configuration
from ochat.config import DataConfig, LoraConfig, OptimConfig, ParallelConfig, TrainConfig
from ochat.model.config import ModelConfig
from ochat.plan import forecast, roofline, tables
from ochat.plan.forecast import PlanInputs
from ochat.plan.gpus import FLASH_3_HOPPER, FP8_HOPPER, GPUS, SUSTAINED_HOPPER
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128)
LLAMA_70B = ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128)
LLAMA_1B = ModelConfig("llama", 128256, 2048, 8192, 16, 32, 8, 64, tie_embeddings=True)
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def make_inputs(model=LLAMA_8B, recompute: Any = "none", longest=4000, budget=8192, bins=64, **parallel) -> PlanInputs:
    workload = Workload(LengthCounts.of(np.array([200, 600, longest])), 0.5)
    data = DataConfig(path="data", token_budget=budget, bins_per_step=bins)
    train, sections = TrainConfig(recompute=recompute), (OptimConfig(), ParallelConfig(**parallel), LoraConfig())
    return PlanInputs(model, workload, 100, data, train, *sections)


@pytest.mark.parametrize("recompute", ["auto", "none", "elementwise", "block"])
@pytest.mark.parametrize(("model", "gpus"), [(LLAMA_8B, 8), (LLAMA_1B, 1), (LLAMA_70B, 64)])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_the_largest_budget_fits_and_the_next_does_not(model, gpus, gpu, recompute):
    inputs, room = make_inputs(model, recompute), gpu.memory_gib * GIB
    largest = forecast.largest_budget(inputs, gpu, inputs.layout(gpus, 8))

    def need(budget: int) -> float:
        return inputs.memory(inputs.resolve(inputs.layout(gpus, 8, budget), room, gpu)).total

    assert need(largest + 256) > room
    assert largest == 0 or need(largest) <= room


def test_auto_is_as_fast_as_the_best_policy_that_fits():
    """8B on 8 GPUs: each memory size has another."""
    taken = set()
    for name in ("H100", "H200"):
        auto = forecast.forecast(make_inputs(recompute="auto", reduce="step"), GPUS[name], gpus=8, nodes=1)
        fitting = {policy: rate.tokens_per_s for policy, (use, rate) in auto.policies.items() if auto.has_room(use)}
        assert auto.speed.tokens_per_s == fitting[auto.recompute] == max(fitting.values())
        assert auto.fits and auto.num_steps == 100
        taken.add(auto.recompute)
    assert taken == {"elementwise", "none"}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("model", [LLAMA_8B, LLAMA_1B, LLAMA_70B])
def test_reduce_auto_is_the_faster_that_fits_and_step_between_nodes(model, gpu):
    for gpus, nodes, bins in ((8, 1, 8), (8, 1, 32), (8, 4, 128)):
        inputs, room = make_inputs(model, "auto", bins=bins), gpu.memory_gib * GIB
        taken = inputs.resolve(inputs.layout(gpus * nodes, gpus), room, gpu)
        both = [
            inputs.resolve_recompute(dataclasses.replace(taken, reduce=name, recompute="auto"), room)
            for name in forecast.REDUCES
        ]
        fitting = [inputs.speed(gpu, each).step_seconds for each in both if inputs.memory(each).total <= room]
        if nodes > 1 or bins == 8:
            assert taken.reduce == "step"
        elif fitting:
            assert inputs.speed(gpu, taken).step_seconds == min(fitting)
        else:
            assert inputs.memory(taken).total == min(inputs.memory(each).total for each in both)


def test_what_does_not_fit_gets_the_budget_that_does_or_what_saves_memory():
    inputs = make_inputs(budget=32768, recompute="block", reduce="step")
    big = forecast.forecast(inputs, dataclasses.replace(GPUS["H100"], memory_gib=65), gpus=8, nodes=1)
    assert not big.fits and big.largest_budget >= 4000
    alone = forecast.forecast(inputs, GPUS["A100-80"], gpus=1, nodes=1)
    assert not alone.fits and alone.largest_budget == 0
    found = tables.notes([big, alone], inputs)
    assert found[0] == f"8 x H100: data.token_budget up to {big.largest_budget:,} fits"
    assert found[1].startswith("1 x A100-80: no token_budget") and "parallel.offload" in found[1]


def test_more_hops_take_longer_and_overlap_with_enough_work():
    def exposed(ranks: int, budget: int) -> float:
        inputs = make_inputs(LLAMA_1B, bins=ranks, budget=budget, shard=ranks)
        return inputs.speed(GPUS["H200"], inputs.layout(ranks, 8)).communication

    assert exposed(4096, 8192) > 4 * exposed(512, 8192)
    hops = 2 * 16 + 2 + 16 + 2  # rings of a step: gathers of 16 blocks twice, embedding and head; sums
    assert exposed(4096, 8192) > hops * 4095 * roofline.HOP_SECONDS * (1 - roofline.OVERLAP)


def test_a_configured_shard_is_kept_where_it_fits_the_gpus():
    inputs = make_inputs(shard=8, replicate=2)
    assert [inputs.layout(ranks, 8).shard for ranks in (16, 4)] == [8, 4]
    assert make_inputs().layout(16, 8).shard == 16


def test_precision_and_time_of_the_update_reach_memory_and_speed():
    """8B in full on one GPU of 80 GB: 2 bytes of weights and 4 of moments a parameter, and no gradients."""
    wide = make_inputs(recompute="block", bins=1, budget=32768)
    optim = OptimConfig(clip=0.0, master_dtype="bfloat16", moment_dtype="bfloat16", in_backward=True)
    narrow = dataclasses.replace(wide, optim=optim)
    found, other = (forecast.forecast(inputs, GPUS["H100"], gpus=1, nodes=1) for inputs in (narrow, wide))
    P = LLAMA_8B.num_parameters()
    assert (found.use.masters, found.use.moments) == (2 * P, 4 * P)
    assert found.fits and found.largest_budget > 16384
    assert not other.fits and other.speed.optimizer == pytest.approx(2 * found.speed.optimizer)


@pytest.mark.parametrize("recipe", ["llama3.2_1b", "llama3_8b_8gpu", "llama3_70b"])
def test_the_table_of_recipes_is_what_the_plan_predicts(recipe):
    """configs/README.md: recipe, machine, options, budget, recompute, GiB, tokens/s a GPU, MFU; or "does not fit"."""
    model = {"llama3.2_1b": LLAMA_1B, "llama3_8b_8gpu": LLAMA_8B, "llama3_70b": LLAMA_70B}[recipe]
    lengths = draw_lengths(Case("tiny", 8192, 64), np.random.default_rng(0), 1_000_000)
    rows = [line.strip("| ").split("|") for line in (CONFIGS / "README.md").read_text("utf-8").splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if row[0].strip() == recipe]
    predicted, step = [row for row in rows if len(row) == 8], configuration.load(CONFIGS / f"{recipe}.toml").data
    assert len(rows) >= 6 and len(predicted) >= 3
    for _, machine, more, budget, recompute, *numbers in predicted:
        nodes, gpus, name = re.fullmatch(r"(?:(\d+) x )?(\d+) (\S+)", machine).groups()  # type: ignore[union-attr]
        tokens, size = int(budget.replace(",", "")), int(gpus) * int(nodes or 1)
        bins = max(round(step.token_budget * step.bins_per_step / tokens / size), 1) * size
        chosen = [f"--data.token_budget={tokens}", f"--data.bins_per_step={bins}"]
        config = configuration.load(CONFIGS / f"{recipe}.toml", [f"--{o.strip('`')}" for o in more.split()] + chosen)
        sections = config.data, config.train, config.optim, config.parallel, config.lora
        inputs = PlanInputs(model, Workload(LengthCounts.of(lengths), 0.5, 0.995), 1000, *sections)
        found = forecast.forecast(inputs, GPUS[name], gpus=int(gpus), nodes=int(nodes or 1))
        rate = found.speed.tokens_per_s / size
        assert found.fits and found.recompute == recompute
        assert numbers == [f"{found.use.total / GIB:.0f}", f"{rate:,.0f}", f"{found.speed.mfu:.0%}"]


def test_the_table_of_bases_in_nf4_is_what_the_plan_predicts():
    """docs/memory.md: model, machine, micro-batch, recompute, GiB and tokens/s a GPU."""
    lengths = draw_lengths(Case("tiny", 8192, 64), np.random.default_rng(0), 1_000_000)
    models, seen = {"Llama-3-8B, NF4": LLAMA_8B, "Llama-3-70B, NF4": LLAMA_70B}, set()
    page = (CONFIGS.parent / "docs" / "memory.md").read_text("utf-8")
    for row in (line.strip("| ").split("|") for line in page.splitlines() if ", NF4 |" in line):
        name, machine, budget, recompute, memory_gib, rate = (cell.strip() for cell in row)
        gpus, card = machine.split(" x ")
        config = configuration.load(
            CONFIGS / "llama3_8b_nf4_24gb.toml",
            [f"--data.token_budget={budget.replace(',', '')}", f"--data.bins_per_step={16 * int(gpus)}"],
        )
        sections = config.data, config.train, config.optim, config.parallel, config.lora, config.base
        inputs = PlanInputs(models[name], Workload(LengthCounts.of(lengths), 0.5, 0.995), 1000, *sections)
        found = forecast.forecast(inputs, GPUS[card], gpus=int(gpus), nodes=1)
        expected = found.recompute, f"{found.use.total / GIB:.0f}", f"{found.speed.tokens_per_s / int(gpus):,.0f}"
        assert found.fits and (recompute, memory_gib, rate) == expected
        seen.add((name, machine))
    assert seen == {
        ("Llama-3-8B, NF4", "1 x RTX4080"), ("Llama-3-8B, NF4", "1 x RTX4090"), ("Llama-3-70B, NF4", "1 x H100"),
        ("Llama-3-70B, NF4", "4 x RTX4090"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("page", "table"),
    [("docs/performance.md", predictions.steps), ("benchmarks/README.md", predictions.parts)],
    ids=["steps", "parts"],
)
def test_the_tables_of_predictions_are_what_the_plan_predicts(page, table):
    """Else run python -m benchmarks.predictions, and put its tables there."""
    rows, text = list(table()), (ROOT / page).read_text("utf-8")
    start = text.index(rows[0])
    assert text[start : text.index("\n\n", start)].splitlines() == rows and len(rows) > 8


def test_the_pages_state_the_rates_and_the_recipes_of_the_plan():
    performance = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for rates in ([SUSTAINED_HOPPER], [FP8_HOPPER], FLASH_3_HOPPER):
        assert f"{' / '.join(f'{rate:,.0f}' for rate in rates)} TFLOP/s" in performance
    found = {tuple(line.split("|")[-4:]) for line in (CONFIGS / "README.md").read_text("utf-8").splitlines()}
    table = (ROOT / "docs" / "memory.md").read_text("utf-8").partition("| recipe |")[2].splitlines()[2:]
    rows = [tuple(line.split("|")[-4:]) for line in table[: table.index("")]]
    assert len(rows) > 5 and set(rows) <= found
