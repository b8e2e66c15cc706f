"""Describe a run in words, as name -> text, for `ochat plan` and for the start of training; and what a plan predicts,
in tables and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table

from ochat.config import DataConfig, DynamicConfig, LossConfig
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader, LoaderStats
from ochat.model.config import ModelConfig
from ochat.plan.forecast import POLICIES, Forecast, PlanInputs, rounded_up
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import PARTS

LOW_FILL = " (low: the data fills few bins; lower data.bins_per_step or data.token_budget)"

PREDICTED = (
    "Predicted, not measured: FLOPs and bytes over what the GPUs reach, with FlashAttention-2, which torch's varlen "
    "attention runs (formulas: ochat/plan/memory.py, roofline.py). Kernels that fall short make it slower."
)
MEMORY_PARTS = ("gradients", "weights", "activations", "working", "allowance", "total")
MEMORY_LEGEND = (
    "state: master weights, both moments and optim.ema's average; weights: casts or gathered blocks that matmuls read; "
    "working: the head's logits and gradients in flight; allowance: assumed for CUDA, NCCL and fragmentation"
)
TIME_COLUMNS = {
    "memory_bound": "memory", "recompute": "recomp.", "launches": "launch", "communication": "comm.",
    "optimizer": "optim.", "imbalance": "imbal.",
}  # fmt: skip
TIME_LEGEND = (
    "memory: norms, RoPE, activations and casts, which memory bandwidth limits; launch: host time beyond the GPU's; "
    "comm.: what does not overlap with computation; imbal.: waiting for the fullest bin"
)
SAVINGS = (
    'train.recompute = "block", parallel.reduce = "micro_batch", optim.moment_dtype and optim.master_dtype = '
    '"bfloat16", parallel.offload = "optimizer", lora.rank = 16, or more GPUs'
)


def describe(
    loader: Loader, model: ModelConfig, data: DataConfig, *, weights_source: str, lr_reason: str
) -> dict[str, str]:
    """All facts of a run; `ochat plan` prints the same as the trainer before its first step."""
    dataset, stats = loader.dataset, loader.stats()
    flops = float(model.flops_per_sequence(dataset.lengths, dataset.supervised)[loader.plan(0).indices].sum())
    return {
        "model": describe_model(model),
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(dataset.lengths.max()):,}",
        **describe_sets(loader),
        "classes": _describe_classes(dataset, weights_source),
        **_describe_conditions(loader),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
        **describe_steps(stats, data, flops, lr_reason),
    }


def describe_model(model: ModelConfig) -> str:
    """Type and size."""
    return f"{model.model_type}, {model.num_parameters():,} parameters"


def describe_steps(stats: LoaderStats, data: DataConfig, flops: float, lr_reason: str) -> dict[str, str]:
    """Steps, packing, work and learning rate; `flops`: of an epoch."""
    epochs = stats.steps_per_epoch
    each = ", ".join(f"{steps:,}" for steps in epochs[:8]) + " ..." * (len(epochs) > 8)
    return {
        "steps": f"{stats.num_steps:,} of {sum(epochs):,} in {len(epochs)} epoch{'s' * (len(epochs) > 1)} ({each})",
        "step": f"{data.bins_per_step} bins of {data.token_budget:,} tokens: "
        f"{stats.tokens_per_step:,.0f} real, {stats.supervised_per_step:,.0f} supervised on average",
        "packing": f"fill {stats.fill:.2%}{LOW_FILL * (stats.fill < 0.5)}; work of a step's bins, max over mean: "
        f"{stats.imbalance_mean:.3f} on average, {stats.imbalance_worst:.3f} at worst",
        "work": f"{flops / stats.num_tokens:.3g} FLOPs a token, {flops:.3g} an epoch",
        "learning rate": lr_reason,
    }


def describe_loss(loss: LossConfig, has_negative: bool) -> dict[str, str]:
    """What changes the weights, and when, as name -> text; nothing where nothing does."""
    first, second = _describe_dynamic(loss), _describe_dynamic(loss.stage2)
    if loss.stage2.from_ == 1 or first == second == "none":
        second = first
    text = first if first == second else f"{first}; {second} after {loss.stage2.from_:.4g} of the steps"
    if "unlikelihood" in text and not has_negative:
        text += "; no weight is negative, so unlikelihood changes nothing"
    return {} if text == "none" else {"dynamic weights": text}


def loss_warnings(loss: LossConfig, has_negative: bool) -> list[str]:
    """Of negative weights that nothing bounds."""
    unbounded = {"loss.dynamic": loss.dynamic if loss.stage2.from_ > 0 else "dft"}
    unbounded |= {"loss.stage2.dynamic": loss.stage2.dynamic if loss.stage2.from_ < 1 else "dft"}
    return [
        f'some weights are negative, and {key} = "{dynamic}": their loss has no lower bound, and the run can diverge; '
        'set it to "unlikelihood", whose gradient fades as the answer becomes unlikely'
        for key, dynamic in unbounded.items()
        if has_negative and dynamic in ("none", "eaft")
    ]


def describe_sets(loader: Loader) -> dict[str, str]:
    """What the first epoch takes of each set of a mixture, as name -> text; nothing for a single data set."""
    if loader.mixture is None:
        return {}
    taken, facts = loader.mixture(0), {}
    for name, part in loader.dataset.sets.items():
        lengths = loader.dataset.lengths[taken[(part.start <= taken) & (taken < part.stop)]]
        total = loader.mixture.totals[name]
        facts[f"set {name}"] = (
            f"{part.stop - part.start:,} conversations, {total:,} tokens; an epoch takes {len(lengths):,}, "
            f"{lengths.sum():,} tokens: {loader.mixture.budgets[name] / total:.3g} passes"
        )
    return facts


def _describe_conditions(loader: Loader) -> dict[str, str]:
    """What is trained without its condition, or under another; nothing where all have their own."""
    if loader.conditions is None:
        return {}
    facts = []
    if loader.conditions.goals == "at_least":
        facts.append(f"a goal at or below the own one, of {', '.join(loader.dataset.levels)}")
    if loader.conditions.dropout:
        facts.append(f"left out of {loader.conditions.dropout:.1%} of the conversations, others in each epoch")
    if loader.cooldown < loader.num_steps:
        left = loader.num_steps - loader.cooldown
        facts.append(f"none in the last {left:,} steps, from step {loader.cooldown + 1:,} on")
    cut, most = loader.dataset.count_cut(loader.conditions(0))
    if cut:
        facts.append(
            f"longer prefixes push the end of {cut:,} conversations out of the context in the first epoch, up to "
            f"{most:,} tokens, which are cut off"
        )
    return {"condition": "; ".join(facts)}


def _describe_dynamic(stage: DynamicConfig) -> str:
    return f"eaft, alpha {stage.eaft_alpha:g}" if stage.dynamic == "eaft" else stage.dynamic


def _describe_classes(dataset: TokenDataset, weights_source: str) -> str:
    """How many conversations each class has and what they weigh; and a note where all classes weigh the same."""
    found = [(name, count, dataset.mean_weight(name)) for name, count in dataset.class_counts().items()]
    weights = [weight for *_, weight in found]
    described = ", ".join(f"{name or '(none)'} {n:,} (mean weight {weight:.4g})" for name, n, weight in found)
    if weights_source != "none" and len(found) > 1 and np.allclose(weights, weights[0]):
        described += "; all weigh the same, no reward tells them apart: give each one, [classes.NAME] reward = ..."
    return described


def data_notes(prepared: Sequence[tuple[object, dict]]) -> list[str]:
    """Conversations that prepare truncated or left out, of each data set: (folder, manifest)."""
    return [
        f"{count:,} conversations{f' of {folder}' if len(prepared) > 1 else ''} were longer than the context of "
        f"{manifest['context']:,} tokens and were {what} by prepare"
        for folder, manifest in prepared
        for key, what in (("truncated", "cut"), ("too_long", "left out"))
        if (count := manifest.get("counts", {}).get(key))
    ]


def length_notes(counts: LengthCounts, budget: int, context: int) -> list[str]:
    """Sequences longer than data.token_budget, or with positions that the base model was not trained on."""
    lost = counts.num_tokens - counts.cut(budget).num_tokens
    limits = {
        f"data.token_budget = {budget:,}: planned as cut there, which loses {lost:,} tokens "
        f"({lost / counts.num_tokens:.2%}); training refuses them, so raise the budget, or prepare with a smaller "
        "--context": budget,
        f"the base model's context of {context:,} tokens (max_position_embeddings), up to {counts.longest:,}": context,
    }
    return [
        f"{over:,} sequences ({over / counts.num_sequences:.2%}) are longer than {text}"
        for text, limit in limits.items()
        if (over := counts.over(limit))
    ]


def tables(forecasts: Sequence[Forecast], inputs: PlanInputs) -> list[Table | str]:
    """What `ochat plan` prints of memory and speed: tables, legends and notes."""
    budget, gpu = f"token_budget {inputs.data.token_budget:,}", ("GPUs", "card")
    memory = {(each.ranks, each.recompute): _memory_cells(each) for each in forecasts}  # the same on each kind of GPU
    fitting = [each for each in forecasts if each.fits]
    names = [TIME_COLUMNS.get(part, part) for part in PARTS]
    speed = ("memory", "fits", "tokens/s", "a GPU", "MFU", "a step", "the run")
    return [
        f"[dim]{PREDICTED}[/]", "",
        _table(f"planned memory of a GPU in GiB, {budget}", ("GPUs", "recompute", "state", *MEMORY_PARTS),
               memory.values(), 1),
        f"[dim]{MEMORY_LEGEND}[/]", "",
        _table("as configured", (*gpu, *speed), map(_speed_cells, forecasts)), "",
        _table("a step's time, %", (*gpu, *names), map(_time_cells, fitting), 1),
        f"[dim]{TIME_LEGEND}[/]", "",
        _table("train.recompute: GiB and tokens/s of a GPU", (*gpu, *POLICIES, "largest token_budget"),
               map(_recompute_cells, forecasts)),
        *(f"[yellow]note[/] {escape(note)}" for note in notes(forecasts, inputs)),
    ]  # fmt: skip


def _memory_cells(each: Forecast) -> list[str]:
    state = each.use.masters + each.use.moments + each.use.average
    bytes_of = [state, *(getattr(each.use, part) for part in MEMORY_PARTS)]
    return [f"{each.ranks:,}", each.recompute, *(f"{size / GIB:,.1f}" for size in bytes_of)]


def _speed_cells(each: Forecast) -> list[str]:
    cells = [f"{each.ranks:,}", each.gpu.name, f"{each.use.total / GIB:,.0f}/{each.gpu.memory_gib:.0f} GiB"]
    if not each.fits:
        return [*cells, "[red]no[/]", *["-"] * 5]
    rate, seconds = each.speed.tokens_per_s, each.speed.step_seconds
    cells += ["yes", rounded(rate), rounded(rate / each.ranks), f"{each.speed.mfu:.0%}"]
    return [*cells, duration(seconds), duration(each.num_steps * seconds)]


def _time_cells(each: Forecast) -> list[str]:
    shares = [getattr(each.speed, part) / each.speed.step_seconds for part in PARTS]
    return [f"{each.ranks:,}", each.gpu.name, *(f"{100 * share:.1f}" for share in shares)]


def _recompute_cells(each: Forecast) -> list[str]:
    """What each train.recompute needs and brings, the run's own in bold; and the largest micro-batch that fits."""
    cells = [f"{each.ranks:,}", each.gpu.name]
    for policy, (use, speed) in each.policies.items():
        rate = f"{rounded(speed.tokens_per_s / each.ranks):>7}" if each.has_room(use) else "no"
        cell = f"{use.total / GIB:,.0f} {rate}"
        cells.append(f"[bold]{cell}[/]" if policy == each.recompute else cell)
    return [*cells, f"{each.largest_budget:,}" if each.largest_budget else "none"]


def notes(forecasts: Sequence[Forecast], inputs: PlanInputs) -> list[str]:
    """What to change where the run does not fit, and what the predictions assumed."""
    bins, longest = inputs.data.bins_per_step, inputs.workload.lengths.longest
    names = {f"{each.ranks:,} x {each.gpu.name}": each for each in forecasts if not each.fits}
    found = [f"{name}: data.token_budget up to {each.largest_budget:,} fits" for name, each in names.items()
             if each.largest_budget >= longest]  # fmt: skip
    if hopeless := [name for name, each in names.items() if each.largest_budget < longest]:
        found.append(f"{', '.join(hopeless)}: no token_budget that holds the longest sequence fits; try {SAVINGS}")
    for ranks in sorted({each.ranks for each in forecasts}):
        if inputs.optim.in_backward and ranks > 1:
            found.append(f"optim.in_backward = true needs one process: a run on {ranks:,} GPUs will refuse it")
        for name in sorted({each.gpu.name for each in forecasts if not each.gpu.fp8_tflops}):
            if inputs.train.linear == "fp8" and ranks == min(each.ranks for each in forecasts):
                found.append(f'train.linear = "fp8" needs a Hopper GPU: a run on {name} will refuse it')
        if bins % ranks:
            shared = rounded_up(bins, ranks)
            found.append(f"data.bins_per_step = {bins} cannot be shared by {ranks:,} GPUs: predicted with {shared:,}")
    return found


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], gap: int = 2) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, gap, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="left" if name in ("card", "fits", "recompute") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def duration(seconds: float) -> str:
    """0.35 s, 12 s, 7 min, 3.4 h, 2.1 days."""
    for limit, unit, size, digits in ((1, "s", 1, 2), (100, "s", 1, 1), (5400, "min", 60, 0), (172800, "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def rounded(rate: float) -> str:
    """Three digits: a prediction has no more."""
    rate = float(f"{rate:.3g}")
    return f"{rate:,.0f}" if rate < 1e6 else f"{rate / 1e6:,.3g} M"
