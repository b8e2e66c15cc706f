"""What is predicted for GPUs, as the tables of docs/performance.md and of benchmarks/README.md have it.

    PYTHONPATH=.:kernels python -m benchmarks.predictions
Steps are what `ochat plan` predicts of drawn chats, as in configs/README.md; ochat/plan/gpus.py has the rates and their
sources. Floors of operators are their least work over BURST: they run for too short a time to heat a card.
tests/plan/test_forecast.py compares the tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from benchmarks import cases, step_cases
from benchmarks.cases import MODELS, OPTIMIZER_VARIANTS
from benchmarks.step_cases import BF16, IN_BACKWARD, Case
from benchmarks.timing import Ceilings
from ochat.plan import tables
from ochat.plan.forecast import Forecast, forecast
from ochat.plan.gpus import GPUS
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload

T = 16384
TOKENS, FILL = 1_000_000, 0.995  # drawn; real tokens over token_budget
BURST = Ceilings(790, 4300)  # measured on an H200 by others
FP8, ADAPTERS = "--train.linear=fp8", "--lora.rank=16"
RATES = {"FlashAttention-2": "flash", "FlashAttention-3": "fa3"}
FACTS = ("model", "GPUs", "micro-batches of a GPU", "weights and moments", "recompute", "GiB")
DOCUMENTS = (512, 1024, 2048, 4096, 8192)


class Step(NamedTuple):
    """A whole step on so many GPUs of a kind."""

    case: Case
    state: str
    gpu: str = "H200"
    gpus: int = 1


STEPS = [
    Step(Case("Llama-3-8B", T, 1, options=IN_BACKWARD), "bf16, updated in backward"),
    Step(Case("Llama-3-8B", T, 1, options=(*IN_BACKWARD, FP8)), "the same, products in fp8"),
    Step(Case("Llama-3-8B", T, 1), "fp32"),
    Step(Case("Llama-3-8B", T, 1, options=(ADAPTERS,)), "adapters of rank 16 over bf16"),
    Step(Case("Llama-2-7B", T, 1, options=IN_BACKWARD), "bf16, updated in backward"),
    Step(Case("Llama-3.2-3B", T, 2), "fp32"),
    Step(Case("Llama-3.2-1B", T, 4), "fp32"),
    Step(Case("Llama-3-8B", T, 32), "fp32", "H100", 8),
    Step(Case("Llama-3-8B", T, 32, options=(FP8,)), "fp32, products in fp8", "H100", 8),
]


def predict(step: Step, backend: str = "flash") -> Forecast:
    """With the rates of a backend of attention."""
    lengths = step_cases.draw_lengths(step.case, np.random.default_rng(0), TOKENS)
    fill = FILL if step.case.lengths == "chats" else 1.0
    workload = Workload(LengthCounts.of(lengths), step.case.supervised, fill)
    case = replace(step.case, options=(*step.case.options, f"--train.attention={backend}"))
    return forecast(step_cases.plan_inputs(case, workload, num_steps=1), GPUS[step.gpu], gpus=step.gpus, nodes=1)


def steps() -> Iterator[str]:
    """The table of whole steps."""
    yield line(*FACTS, *(name for rate in RATES for name in (f"tokens/s a GPU, {rate}", "MFU")))
    yield "|---|---|---|---|---|---:|---:|---:|---:|---:|"
    for step in STEPS:
        found = [predict(step, backend) for backend in RATES.values()]
        assert all(each.fits for each in found), step
        micro_batches = f"{step.case.bins_per_step // step.gpus} x {step.case.token_budget:,}"
        facts = (step.case.model, f"{step.gpus} {step.gpu}", micro_batches, step.state, found[0].recompute)
        rates = [(tables.rounded(each.speed.tokens_per_s / step.gpus), f"{each.speed.mfu:.0%}") for each in found]
        yield line(*facts, f"{found[0].use.total / GIB:.0f}", *(cell for pair in rates for cell in pair))


def parts() -> Iterator[str]:
    """The table of what a step of one H200 consists of."""
    yield line("what", "prediction, ms", "computed from")
    yield "|---|---|---|"
    yield from _attention()
    yield from _operators()
    yield _quantised()
    yield _updates()
    yield _recomputed()


def _attention() -> Iterator[str]:
    layer = replace(step_cases.model_config(Case("Llama-3-8B", T, 1)), num_layers=1)
    workloads = [Workload(LengthCounts.of(np.array([length])), 1.0) for length in DOCUMENTS]
    for rate, backend in RATES.items():
        taken_ms = [T * 1e3 * each.attention_seconds(layer, GPUS["H200"], backend) for each in workloads]
        what = f"attention of a layer by {rate}, documents of {slashed(DOCUMENTS, ',')}"
        yield line(what, slashed(taken_ms, ".1f"), "14 N D FLOPs a pair")


def _operators() -> Iterator[str]:
    heads = [floor_ms("linear_cross_entropy", model) for model in MODELS]
    yield line(f"`linear_cross_entropy`, {' / '.join(MODELS)}", f"at best {slashed(heads, '.1f')}", "6 T H V FLOPs")
    names = [name for name in cases.OPERATORS if name not in ("linear_cross_entropy", "adamw")]
    floors = slashed([floor_ms(name) for name in names], ".3f")
    yield line(" / ".join(f"`{name}`" for name in names), f"at best {floors}", "bytes in `kernels/README.md`")
    floors = slashed([floor_ms("adamw", variant=each) for each in OPTIMIZER_VARIANTS], ".2f")
    count = cases.num_parameters(cases.Case("adamw", MODELS["Llama-3-8B"], T)) / 1e6
    what = f"`adamw`, {count:.0f} million parameters, {' / '.join(OPTIMIZER_VARIANTS)}"
    yield line(what, f"at best {floors}", f"{slashed(OPTIMIZER_VARIANTS.values(), '')} bytes a parameter")


def _quantised() -> str:
    speeds = [predict(step).speed for step in STEPS[:2]]
    taken_ms = [f"{each.matmul * 1e3:.0f} + {each.memory_bound * 1e3:.0f}" for each in speeds]
    why = "e4m3 rows, but for gradients of weights; rows are read again and written"
    return line("products + memory-bound operators of a step of 8B on chats, bf16 / fp8", " / ".join(taken_ms), why)


def _updates() -> str:
    states = {"fp32": (), "bf16 moments": BF16[1:], "all bf16": BF16}
    seconds = [predict(Step(Case("Llama-3-8B", T, 1, options=each), "")).speed.optimizer for each in states.values()]
    parameters = step_cases.model_config(Case("Llama-3-8B", T, 1)).num_parameters()
    moved = slashed([each * GPUS["H200"].copy_bandwidth / parameters for each in seconds], ".0f")
    why = f"{moved} bytes a parameter, with the norm and copies, if any"
    taken_ms = slashed([each * 1e3 for each in seconds], ".1f")
    return line(f"the optimizer's part of a step of 8B, {' / '.join(states)}", taken_ms, why)


def _recomputed() -> str:
    case = Case("Llama-3-8B", T, 1, options=IN_BACKWARD, longest=2048, lengths="equal")
    policies = predict(Step(case, "")).policies
    kept = slashed([use.activations / GIB for use, _ in policies.values()], ".1f")
    taken_ms = slashed([speed.recompute * 1e3 for _, speed in policies.values()], ".0f")
    what = f"`train.recompute` of 8B, {' / '.join(policies)}, documents of 2,048"
    return line(what, taken_ms, f"it keeps {kept} GiB of activations")


def floor_ms(operator: str, model: str = "Llama-3-8B", variant: str = "") -> float:
    """Of an operator with its gradients."""
    return BURST.floor_ms(*cases.cost(cases.Case(operator, MODELS[model], T, variant=variant), "forward+backward"))


def slashed(values: Iterable[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(*steps(), "", *parts(), sep="\n")
