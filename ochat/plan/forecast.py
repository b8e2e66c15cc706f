"""What named cards would make of a run: does it fit, how fast, and with which token_budget.

    rows = [forecast(Run(model, config, workload, num_steps), card, gpus=8, nodes=1) for card in CARDS.values()]

Memory is memory.py's, time speed.py's; here a run is tried at several sizes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from ochat.config import Config
from ochat.model import lora
from ochat.model.config import ModelConfig
from ochat.plan import memory, memory_lora, roofline
from ochat.plan.gpus import Card
from ochat.plan.memory import GIB, MemoryUse, Setting
from ochat.plan.roofline import Cut, Speed, Workload

STEP_OF_BUDGET = 256  # tokens: the largest budget that fits is found to so many
MOST_TOKENS = 2**22  # no larger budget is tried
NEARLY = 0.98  # of the best speed: a smaller budget is as good, and leaves room
NOTABLE = 1.03  # a gain worth a line
MOST_GPUS = 4096
POLICIES = ("none", "elementwise", "block")  # of train.recompute, from the fastest to that of the least memory
SAVINGS = (("train", "recompute", "block"), ("parallel", "reduce", "micro_batch"), ("parallel", "offload", "optimizer"))


@dataclass(frozen=True)
class Run:
    """All that a forecast asks of a configuration and its data."""

    model: ModelConfig
    config: Config
    workload: Workload
    num_steps: int

    def cut(self, ranks: int, gpus_per_node: int, token_budget: int = 0, bins_per_step: int = 0) -> Cut:
        """The run on so many GPUs, as configured or with another budget; its recompute may be "auto"."""
        data, parallel = self.config.data, self.config.parallel
        shard = parallel.shard or ranks // parallel.replicate
        return Cut(
            token_budget or data.token_budget,
            bins_per_step or rounded_up(data.bins_per_step, ranks),
            self.config.train.recompute,
            ranks,
            shard if shard * parallel.replicate == ranks else ranks,
            gpus_per_node,
            4 if self.config.train.dtype == "float32" else 2,
            adapters=lora.num_parameters(self.model, self.config.lora),
            **self._choices(),
        )

    @property
    def policies(self) -> tuple[str, ...]:
        """Those of POLICIES that "auto" may mean: a compiler makes no result of a kernel again."""
        train = self.config.train
        if train.offload_activations:
            return POLICIES[-1:]
        return tuple(p for p in POLICIES if p != "elementwise" or not train.compile or train.kernels == "reference")

    def settled(self, cut: Cut, room: float) -> Cut:
        """The cut with "auto" replaced by the first of the policies that fits `room` bytes, or else by the last."""
        if cut.recompute != "auto":
            return cut
        cuts = [with_policy(cut, policy) for policy in self.policies]
        return next((each for each in cuts if self.memory(each).total <= room), cuts[-1])

    def memory(self, cut: Cut) -> MemoryUse:
        """Of the fullest GPU."""
        supervised = round(cut.token_budget * self.workload.supervised_share)
        setting = Setting(
            cut.token_budget, supervised, cut.recompute, cut.ranks, cut.shard, cut.bins_per_step // cut.ranks,
            itemsize=cut.itemsize, **{**self._choices(), "offload_activations": cut.offload_activations},
        )  # fmt: skip
        if self.config.lora.rank:
            return memory_lora.predict(self.model, setting, self.config.lora)
        setting = dataclasses.replace(setting, in_backward=self.config.optim.in_backward)
        return memory.predict(self.model, setting)

    def _choices(self) -> dict[str, Any]:
        """Those of sharding and precision, under the names that memory and speed give them."""
        parallel, bf16 = self.config.parallel, self.config.parallel.reduce_dtype == "bfloat16"
        named = {"reshard": parallel.reshard, "reduce": parallel.reduce, "offload": parallel.offload}
        return named | {
            "reduce_itemsize": 2 if bf16 else 4, "offload_activations": self.config.train.offload_activations,
            "master_itemsize": itemsize(self.config.optim.master_dtype),
            "state_itemsize": itemsize(self.config.optim.moment_dtype),
        }  # fmt: skip

    def bins_for(self, token_budget: int, ranks: int) -> int:
        """Bins of another budget that keep the step's tokens, in shares for all ranks; one each where weights are
        updated in backward."""
        if self.config.optim.in_backward:
            return ranks
        tokens = self.config.data.token_budget * self.config.data.bins_per_step
        return max(round(tokens / token_budget / ranks), 1) * ranks


@dataclass(frozen=True)
class Forecast:
    """One card and number of GPUs. `advice`: what to set, or what it would take, and why."""

    card: Card
    ranks: int
    use: MemoryUse
    speed: Speed
    policies: dict[str, tuple[MemoryUse, Speed]]  # each of POLICIES
    recompute: str  # as configured, or what "auto" means here
    run_seconds: float
    largest_budget: int  # that fits; 0: none
    best: Cut | None  # what is recommended
    advice: str

    @property
    def fits(self) -> bool:
        return self.has_room(self.use)

    def has_room(self, use: MemoryUse) -> bool:
        return use.total <= self.card.memory_gib * GIB


def forecast(run: Run, card: Card, *, gpus: int, nodes: int) -> Forecast:
    """The run as it is configured on `nodes` times `gpus` cards, and the best budget there."""
    ranks = gpus * nodes
    configured = run.cut(ranks, gpus)
    cut = run.settled(configured, card.memory_gib * GIB)
    as_configured = roofline.predict(run.model, card, run.workload, cut)
    steps = run.num_steps * run.config.data.bins_per_step / cut.bins_per_step  # fewer where bins were rounded up
    largest = largest_budget(run, card, configured)
    best = recommend(run, card, configured, largest)
    policies = [with_policy(cut, policy) for policy in POLICIES]
    return Forecast(
        card, ranks, run.memory(cut), as_configured,
        {
            each.recompute: (run.memory(each), roofline.predict(run.model, card, run.workload, each))
            for each in policies
        },
        cut.recompute, steps * as_configured.step_seconds, largest, best,
        _why(run, card, cut, best) if best else _remedy(run, card, configured, largest),
    )  # fmt: skip


def largest_budget(run: Run, card: Card, cut: Cut) -> int:
    """The largest token_budget, in steps of STEP_OF_BUDGET, with which the run fits; 0 if none does."""

    def fits(steps: int) -> bool:
        room = card.memory_gib * GIB
        tried = dataclasses.replace(cut, token_budget=steps * STEP_OF_BUDGET)
        return run.memory(run.settled(tried, room)).total <= room

    low, high = 0, MOST_TOKENS // STEP_OF_BUDGET + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * STEP_OF_BUDGET


def recommend(run: Run, card: Card, cut: Cut, largest: int) -> Cut | None:
    """The smallest budget within NEARLY of the fastest that fits and keeps the tokens of a step; None if none holds the
    longest sequence.

    Budgets of at least twice the longest sequence come first: with less room the bins of a step cannot be evened.
    """
    data, longest = run.config.data, run.workload.lengths.longest
    most = min(largest, max(data.token_budget * data.bins_per_step // cut.ranks, data.token_budget))
    budgets = [budget for budget in (*_round_numbers(most), data.token_budget) if longest <= budget <= most]
    budgets = [budget for budget in budgets if budget >= 2 * longest] or budgets
    room = card.memory_gib * GIB
    cuts = [run.cut(cut.ranks, cut.gpus_per_node, b, run.bins_for(b, cut.ranks)) for b in sorted(set(budgets))]
    cuts = [each for each in (run.settled(each, room) for each in cuts) if run.memory(each).total <= room]
    rates = [roofline.predict(run.model, card, run.workload, each).tokens_per_s for each in cuts]
    return next((each for each, rate in zip(cuts, rates, strict=True) if rate >= NEARLY * max(rates)), None)


def with_policy(cut: Cut, policy: str) -> Cut:
    """The cut with this train.recompute; inputs of blocks wait on the host only where they are all that is kept."""
    return dataclasses.replace(cut, recompute=policy, offload_activations=cut.offload_activations and policy == "block")


def rounded_up(bins: int, ranks: int) -> int:
    """Bins of a step that `ranks` can share."""
    return -(-bins // ranks) * ranks


def _why(run: Run, card: Card, cut: Cut, best: Cut) -> str:
    """What the recommendation rests on."""
    data, longest = run.config.data, run.workload.lengths.longest
    rate = roofline.predict(run.model, card, run.workload, best).tokens_per_s
    reasons = [f"the smallest within {1 - NEARLY:.0%} of the fastest that fits"]
    if best.token_budget < 2 * longest:
        reasons.append("less than twice the longest sequence, so the work of a step's bins is uneven")
    if best.token_budget != data.token_budget:
        gain = rate / roofline.predict(run.model, card, run.workload, cut).tokens_per_s - 1
        reasons.append(f"{gain:+.0%} tokens/s")
    others = [_with_policy(run, card, cut, policy) for policy in POLICIES[: POLICIES.index(best.recompute)]]
    kept, faster = max((each for each in others if each), key=lambda each: each[1], default=(best, rate))
    if faster > NOTABLE * rate:
        reasons.append(
            f'train.recompute = "{kept.recompute}" with token_budget {kept.token_budget:,} and bins_per_step '
            f"{kept.bins_per_step:,} brings {faster / rate - 1:+.0%} more"
        )
    return "; ".join(reasons)


def _with_policy(run: Run, card: Card, cut: Cut, policy: Any) -> tuple[Cut, float] | None:
    """What is recommended under another train.recompute, and its tokens a second; None if that does not fit."""
    train = structs.replace(run.config.train, recompute=policy, offload_activations=False)
    run = dataclasses.replace(run, config=structs.replace(run.config, train=train))
    cut = run.cut(cut.ranks, cut.gpus_per_node)
    best = recommend(run, card, cut, largest_budget(run, card, cut))
    return best and (best, roofline.predict(run.model, card, run.workload, best).tokens_per_s)


def _remedy(run: Run, card: Card, cut: Cut, largest: int) -> str:
    """What would make room where nothing fits."""
    longest = run.workload.lengths.longest
    if largest >= longest:
        return "a step of so few tokens leaves no budget that holds the longest sequence; raise data.bins_per_step"
    settings, tried = [], run
    for section, key, value in SAVINGS[: 1 if run.config.lora.rank else None]:
        changed = structs.replace(getattr(tried.config, section), **{key: value})
        if changed == getattr(tried.config, section) or (key == "reduce" and cut.ranks == 1):
            continue
        if key == "recompute" and tried.config.train.recompute == "auto":
            continue  # has tried it
        settings.append(f'{section}.{key} = "{value}"')
        tried = dataclasses.replace(tried, config=structs.replace(tried.config, **{section: changed}))
        if (budget := largest_budget(tried, card, tried.cut(cut.ranks, cut.gpus_per_node))) >= longest:
            there = f"set {' and '.join(settings)}: then up to {budget:,} tokens fit"
            return there + (_on_the_card(tried, card, cut) if key == "offload" else "")
    ranks = cut.ranks * 2
    while ranks <= MOST_GPUS:
        if largest_budget(run, card, run.cut(ranks, cut.gpus_per_node)) >= longest:
            return f"use {ranks} GPUs, the fewest of twice, four times ... as many on which it fits"
        ranks *= 2
    return "no number of GPUs makes room"


def _on_the_card(run: Run, card: Card, cut: Cut) -> str:
    """What would fit with the moments on the card and not, as in `run`, on the host; empty where nothing would."""
    parallel = structs.replace(run.config.parallel, offload="none", reduce="step")
    optim = structs.replace(run.config.optim, master_dtype="bfloat16", moment_dtype="bfloat16")
    what, one_bin = (
        'optim.master_dtype and optim.moment_dtype = "bfloat16"',
        structs.replace(run.config.data, bins_per_step=1),
    )
    alone = structs.replace(optim, in_backward=True, clip=0.0)
    choices: dict[str, dict[str, Any]] = {what: {"optim": optim}}
    if cut.ranks == 1:
        choices[f"{what}, optim.in_backward = true, optim.clip = 0 and data.bins_per_step = 1"] = {
            "optim": alone, "data": one_bin
        }  # fmt: skip
    for text, sections in choices.items():
        tried = dataclasses.replace(run, config=structs.replace(run.config, parallel=parallel, **sections))
        budget = largest_budget(tried, card, tried.cut(cut.ranks, cut.gpus_per_node))
        if budget >= run.workload.lengths.longest:
            return f"; with {text} instead of the host, up to {budget:,}"
    return ""


def itemsize(dtype: str) -> int:
    """Bytes of "float32" or "bfloat16"."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def _round_numbers(most: int) -> list[int]:
    """64, 96, 128, 192 ... up to `most`."""
    return [n for k in range(6, 23) for n in (2**k, 3 * 2 ** (k - 1)) if n <= most]
