"""Predict a run on named GPUs: does it fit, how fast is it, and which train.recompute fits.

    inputs = PlanInputs(model, workload, num_steps, data, train, optim, parallel, lora, base)  # sections
    found = forecast(inputs, GPUS["H100"], gpus=8, nodes=1);  found.fits, found.speed.mfu

memory.py predicts memory, roofline.py time; here a run's configuration becomes the Layout that both take.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass

from ochat.config import BaseConfig, DataConfig, LoraConfig, OptimConfig, ParallelConfig, TrainConfig
from ochat.model.config import ModelConfig
from ochat.plan import memory, roofline
from ochat.plan.gpus import GpuSpec
from ochat.plan.memory import GIB, Layout, MemoryUse
from ochat.plan.roofline import Speed, Workload

BUDGET_STEP = 256  # tokens: resolution of the largest budget that fits
MAX_BUDGET = 2**22  # tokens: no larger budget is tried
POLICIES = ("none", "elementwise", "block")  # of train.recompute, from the fastest to the smallest
REDUCES = ("step", "micro_batch")  # of parallel.reduce
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class PlanInputs:
    """All that a forecast needs of a model, its data and the configuration."""

    model: ModelConfig
    workload: Workload
    num_steps: int
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    lora: LoraConfig
    base: BaseConfig = BaseConfig()

    def layout(self, ranks: int, gpus_per_node: int, token_budget: int = 0) -> Layout:
        """The run on so many GPUs, with this or the configured budget; `recompute`, `reduce` may still be "auto"."""
        parallel, budget = self.parallel, token_budget or self.data.token_budget
        shard = parallel.shard or ranks // parallel.replicate
        return Layout(
            token_budget=budget,
            bins_per_step=rounded_up(self.data.bins_per_step, ranks),
            recompute=self.train.recompute,
            ranks=ranks,
            shard=shard if shard * parallel.replicate == ranks else ranks,
            gpus_per_node=gpus_per_node,
            supervised=round(budget * self.workload.supervised_share),
            lora=self.lora,
            quantize=self.base.quantize,
            linear=self.train.linear,
            itemsize=ITEMSIZE[self.train.dtype],
            master_itemsize=ITEMSIZE[self.optim.master_dtype],
            state_itemsize=ITEMSIZE[self.optim.moment_dtype],
            reduce_itemsize=ITEMSIZE[parallel.reduce_dtype],
            reshard=parallel.reshard,
            reduce=parallel.reduce,
            offload=str(parallel.offload),
            offload_activations=self.train.offload_activations,
            attention=self.train.attention,
            in_backward=self.optim.in_backward,
            ema=self.optim.ema > 0,
        )

    @property
    def policies(self) -> tuple[str, ...]:
        """The POLICIES that "auto" chooses from: a compiler cannot recompute results of a Triton kernel."""
        train = self.train
        if train.offload_activations:
            return POLICIES[-1:]
        return tuple(p for p in POLICIES if p != "elementwise" or not train.compile or train.kernels == "reference")

    def resolve_recompute(self, layout: Layout, room: float) -> Layout:
        """Replace "auto" by the first policy that fits `room` bytes, or by the last one."""
        if layout.recompute != "auto":
            return layout
        layouts = [with_policy(layout, policy) for policy in self.policies]
        return next((each for each in layouts if self.memory(each).total <= room), layouts[-1])

    def resolve(self, layout: Layout, room: float, gpu: GpuSpec) -> Layout:
        """Replace every "auto": of the layouts that fit `room` bytes the fastest, else the one that needs least."""
        found = [self.resolve_recompute(each, room) for each in reductions(layout)]
        fitting = [each for each in found if self.memory(each).total <= room]
        if not fitting:
            return min(found, key=lambda each: self.memory(each).total)
        return min(fitting, key=lambda each: self.speed(gpu, each).step_seconds)

    def memory(self, layout: Layout) -> MemoryUse:
        """Memory of the GPU that needs most."""
        return memory.predict(self.model, layout)

    def speed(self, gpu: GpuSpec, layout: Layout) -> Speed:
        """Time of a step on such GPUs."""
        return roofline.predict(self.model, gpu, self.workload, layout)


@dataclass(frozen=True)
class Forecast:
    """A run on a number of GPUs of one kind."""

    gpu: GpuSpec
    ranks: int
    policies: dict[str, tuple[MemoryUse, Speed]]  # with each of POLICIES
    recompute: str  # as configured, or as "auto" resolves here
    num_steps: float  # of the run: fewer where bins were rounded up
    largest_budget: int  # the largest token_budget that fits; 0: none

    @property
    def use(self) -> MemoryUse:
        return self.policies[self.recompute][0]

    @property
    def speed(self) -> Speed:
        return self.policies[self.recompute][1]

    @property
    def fits(self) -> bool:
        return self.has_room(self.use)

    def has_room(self, use: MemoryUse) -> bool:
        """Whether so much fits on this GPU."""
        return use.total <= self.gpu.memory_gib * GIB


def forecast(inputs: PlanInputs, gpu: GpuSpec, *, gpus: int, nodes: int) -> Forecast:
    """The run as configured on `nodes` times `gpus` GPUs."""
    configured = inputs.layout(gpus * nodes, gpus)
    layout = inputs.resolve(configured, gpu.memory_gib * GIB, gpu)
    policies = [with_policy(layout, policy) for policy in POLICIES]
    return Forecast(
        gpu=gpu,
        ranks=layout.ranks,
        policies={each.recompute: (inputs.memory(each), inputs.speed(gpu, each)) for each in policies},
        recompute=layout.recompute,
        num_steps=inputs.num_steps * inputs.data.bins_per_step / layout.bins_per_step,
        largest_budget=largest_budget(inputs, gpu, configured),
    )


def largest_budget(inputs: PlanInputs, gpu: GpuSpec, layout: Layout) -> int:
    """The largest token_budget that fits, a multiple of BUDGET_STEP; 0 if none does."""

    def is_too_large(budget: int) -> bool:
        room = gpu.memory_gib * GIB
        tried = inputs.layout(layout.ranks, layout.gpus_per_node, budget)
        return inputs.memory(inputs.resolve(tried, room, gpu)).total > room

    budgets = range(BUDGET_STEP, MAX_BUDGET + 1, BUDGET_STEP)
    return BUDGET_STEP * bisect_left(budgets, True, key=is_too_large)


def with_policy(layout: Layout, policy: str) -> Layout:
    """The layout with this train.recompute; only "block" can offload its activations, the inputs of blocks."""
    offloads = layout.offload_activations and policy == "block"
    return dataclasses.replace(layout, recompute=policy, offload_activations=offloads)


def reductions(layout: Layout) -> list[Layout]:
    """The layouts that parallel.reduce = "auto" chooses from: "micro_batch" pays where the sums cross no slow link,
    so only within a node; sums in bf16 need it, and bf16 masters, whose gradients FSDP would add up in bf16, rule it
    out."""
    if layout.reduce != "auto":
        return [layout]
    if layout.master_itemsize == 2:
        choices = REDUCES[:1]
    elif layout.reduce_itemsize == 2:
        choices = REDUCES[1:]
    elif layout.micro_batches > 1 and 1 < layout.shard <= layout.gpus_per_node:
        choices = REDUCES
    else:
        choices = REDUCES[:1]
    return [dataclasses.replace(layout, reduce=each) for each in choices]


def rounded_up(bins: int, ranks: int) -> int:
    """Bins of a step that `ranks` can share evenly."""
    return -(-bins // ranks) * ranks
