"""What the cases of the whole step should reach on a card, by the product's own plan: times and memory, not measured.

PYTHONPATH=.:kernels python -m benchmarks.train_step_forecast     # a line of README's table for each case, on an H200
"""

from __future__ import annotations

import tempfile

import numpy as np

from benchmarks import train_step_cases
from benchmarks.train_step_cases import PHASES, Case
from ochat import config as configuration
from ochat.packing import multipack
from ochat.plan import forecast
from ochat.plan.forecast import Forecast, PlanInputs
from ochat.plan.gpus import GPUS, GpuSpec
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload

STEPS = 100  # that are drawn and packed


def predict(case: Case, gpu: GpuSpec, gpus: int = 1) -> Forecast:
    """Ours on one such card, or several: the case's own drawn lengths, packed as the run would pack them."""
    options = train_step_cases.options(case, {"base.path": "-", "data.path": "-"})
    with tempfile.NamedTemporaryFile(suffix=".toml") as empty:
        config = configuration.load(empty.name, options)
    tokens = STEPS * case.bins_per_step * case.token_budget
    lengths = train_step_cases.draw_lengths(case, np.random.default_rng(0), tokens)
    budget, bins = case.token_budget, case.bins_per_step
    plan = multipack.plan(lengths, token_budget=budget, bins_per_step=bins, seed=0, epoch=0)
    workload = Workload(LengthCounts.of(lengths), case.supervised, plan.efficiency())
    sections = config.data, config.train, config.optim, config.parallel, config.lora
    inputs = PlanInputs(train_step_cases.model_config(case), workload, plan.num_steps, *sections)
    return forecast.forecast(inputs, gpu, gpus=gpus, nodes=1)


def main() -> None:
    print("| model | micro-batches | options | recompute | tokens/s | MFU | GiB |\n|---|---|---|---|---|---|---|")
    for case in PHASES["ours"]:
        expected = predict(case, GPUS["H200"])
        speed, options = expected.speed, " ".join(option.removeprefix("--") for option in case.options)
        cells = [case.model, f"{case.bins_per_step} x {case.token_budget:,}", f"`{options}`" if options else ""]
        cells += [expected.recompute]
        cells += [f"{speed.tokens_per_s:,.0f}", f"{speed.mfu:.0%}", f"{expected.use.total / GIB:.0f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
