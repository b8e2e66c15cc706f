"""Build the parts of a run from its configuration, in this order: inputs, resolved choices, model, outputs.

    inputs = open_inputs(config, ranks)               # base configuration, tokenizer, data; checked
    resolved = resolve(config, inputs, ranks)         # the configuration without "auto", and the reasons
    parts = build_model(resolved.config, inputs, ranks)
    outputs = open_outputs(resolved, inputs, parts, ranks, found)    # after the checkpoint `found` is loaded

Only this module, the trainer and commands take a whole Config. `ochat plan` opens its data here too, so that it shows
what the run will do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ochat_kernels
import torch
from msgspec import structs

from ochat import config as configuration
from ochat.checkpoint import load
from ochat.checkpoint.manifest import Manifest
from ochat.checkpoint.save import AsyncCheckpointer
from ochat.config import ConditionConfig, Config, LogConfig
from ochat.console import waiting
from ochat.data.dataset import Paths, TokenDataset
from ochat.data.epoch.conditions import ConditionDraws
from ochat.data.epoch.mixture import Mixture
from ochat.data.loader import Loader
from ochat.distributed import processes
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.export import serving
from ochat.files import atomic
from ochat.files.jsonl import JsonlWriter
from ochat.model import fp8, hf, lora
from ochat.model.attention import backends
from ochat.model.attention.backends import Needs
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.plan.forecast import PlanInputs
from ochat.plan.lengths import LengthCounts
from ochat.plan.roofline import Workload
from ochat.run import layout
from ochat.run.nonfinite import NonFiniteGuard
from ochat.text import tokenizer as tokenizers
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer
from ochat.train import attention_choice, identity, metrics, optim, schedule, sharding, verify
from ochat.train import resolve as choices
from ochat.train.adapters import Adapters
from ochat.train.average import WeightAverage
from ochat.train.display import Display, trackers
from ochat.train.evaluations import sets as eval_sets
from ochat.train.evaluations.exact import ExactTask
from ochat.train.loss import has_dynamic
from ochat.train.metrics import MetricsLog

CPU_MULTIPLE = 64  # of tokens and of supervised rows: a CPU keeps 0.5 MB for each shape of a product that it meets


@dataclass(frozen=True)
class RunInputs:
    """What a run reads. They are checked to belong together."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    dataset: TokenDataset
    loader: Loader
    held_out: dict[str, Loader]  # by name: HELD_OUT for data.eval_path, and the sets of [eval] whose loss is measured
    tasks: dict[str, ExactTask]  # the others of [eval]
    template: Template  # with the default condition that the trained model is served under


@dataclass(frozen=True)
class Resolved:
    """All choices of a run."""

    asked: Config  # as the user wrote it; the run folder keeps it
    config: Config  # without "auto": every choice of resolve.py, and optim.lr, is made
    attention_reason: str
    recompute_reason: str
    reduce_reason: str
    lr_reason: str
    peak_flops: float  # of one device; MFU is relative to it
    peak_source: str


@dataclass(frozen=True)
class RunModel:
    """What is trained, in memory; load it before use."""

    ops: ModuleType
    adapters: Adapters | None  # None: every weight is trained
    model: Transformer
    optimizer: torch.optim.AdamW | optim.FusedAdamW
    average: WeightAverage | None  # None: optim.ema is 0
    identity: dict[str, Any]  # what a checkpoint and the run that resumes from it have in common


@dataclass(frozen=True)
class RunOutputs:
    """What a run writes and shows."""

    lines: dict[str, JsonlWriter]  # by name, those of layout.LINES; ranks other than the first write nowhere
    checkpointer: AsyncCheckpointer
    metrics: MetricsLog
    display: Display


def open_inputs(config: Config, ranks: Ranks) -> RunInputs:
    """Open and check base, tokenizer and data; takes no memory for the model.

    Raises: ConfigError, DataError, CheckpointError naming what is missing, damaged or does not belong together.
    """
    optim.check(config.optim, ranks.world)
    model_config = ModelConfig.load(config.base.path)
    if config.data.verify:
        sets = [*(share.path for share in config.data.mix.values()), config.data.path, *held_out_paths(config).values()]
        verify.data(sets, ranks)
    on_gpu = ranks.device.type == "cuda"  # every batch then has data.token_budget tokens; a CPU would compute padding
    place: dict[str, Any] = {"rank": ranks.rank, "world": ranks.world, "pad": on_gpu, "pin": on_gpu}
    place["multiple"] = 1 if on_gpu else CPU_MULTIPLE
    place["fix_documents"] = on_gpu and config.train.compile
    dataset, held_out = open_dataset(config), open_held_out(config)
    loader = open_loader(config, dataset, model_config, **place)
    place |= {"token_budget": loader.token_budget, "bins_per_step": ranks.world}
    held_out_loaders = {name: Loader(each, **place) for name, each in held_out.items()}  # one pass in a fixed order
    tokenizer, template = tokenizers.load(config.base.path), identity.served_template(dataset)
    identity.check_inputs(dataset, held_out.values(), tokenizer, model_config, config.base.path)
    tasks = open_tasks(config, dataset, tokenizer, model_config)
    eval_sets.check_best(config.checkpoint.best, held_out, tasks)
    if not layout.checkpoint_folders(Path(config.run.dir)):  # else it starts from a checkpoint
        hf.open_tensors(config.base.path, model_config)
    return RunInputs(model_config, tokenizer, dataset, loader, held_out_loaders, tasks, template)


def check(config: Config, world: int) -> RunInputs:
    """Open what a run on `world` processes reads, and refuse what it would refuse before its first step, but for what
    only its device can say: no GPU, and no memory for the model.

    Raises: as open_inputs, resolve and Trainer.load.
    """
    ranks, run = processes.alone(), config.run
    choices.determinism(run.deterministic, compiles=config.train.compile)
    processes.check_counts(config.parallel, world)
    trackers(config.log)
    choices.quantize(config.base.quantize, ranks.device)
    inputs = open_inputs(config, ranks)
    optim.check(config.optim, world)
    model, base = inputs.model_config, Path(config.base.path)
    open_loader(config, inputs.dataset, model, rank=0, world=world)
    check_model(config, model)
    if config.train.device == "cpu":
        resolve(config, inputs, ranks)
    adapters = open_adapters(config, inputs)
    found = load.find_checkpoint(Path(run.dir), run.resume, ranks)
    if found is not None and not run.resume_mismatched:
        load.check_identity(found, run_identity(config, inputs, adapters))
    if found is None or adapters:
        verify.base(base, ranks)
    return inputs


def check_model(config: Config, model: ModelConfig) -> None:
    """Raises: ConfigError for attention that lacks what the model needs, linears that cannot have its sizes, or results
    that no compiler recomputes."""
    if config.train.attention != "auto":
        needs = Needs.of(model, getattr(torch, config.train.dtype), config.run.deterministic)
        backends.check(config.train.attention, needs)
    if config.train.linear == "fp8":
        fp8.check(model)
    if config.train.device != "cpu":
        kernels = "triton" if config.train.kernels == "auto" else config.train.kernels
        choices.check_recompute(structs.replace(config.train, kernels=kernels))
    if config.lora.rank > 0:
        lora.target_modules(model, config.lora.targets)


def open_dataset(config: Config) -> TokenDataset:
    """The prepared data that is trained on, one set or several, with the configured weights and selection."""
    return TokenDataset(
        {name: share.path for name, share in config.data.mix.items()} or config.data.path,
        classes=config.classes,
        weights=config.weights,
        only_class=config.data.only_class,
        subsample=config.data.subsample,
        seed=config.run.seed,
    )


def open_held_out(config: Config) -> dict[str, TokenDataset]:
    """The held-out sets whose loss is measured, by name."""
    return eval_sets.open_sets(held_out_paths(config), config.classes, config.weights)


def open_tasks(config: Config, dataset: TokenDataset, tokenizer: Tokenizer, model: ModelConfig) -> dict[str, ExactTask]:
    """The exact-match tasks, by name, for the model that is trained on this data."""
    template, context = identity.served_template(dataset), model.max_position_embeddings
    return eval_sets.open_tasks(config.eval, dataset, template, tokenizer, context)


def held_out_paths(config: Config) -> dict[str, Paths]:
    """Where they are."""
    return eval_sets.paths(config.data.eval_path, config.eval)


def open_loader(config: Config, dataset: TokenDataset, model: ModelConfig, **place: Any) -> Loader:
    """The steps of the run; the bins of a step are balanced by the model's FLOPs. `place`: the Loader's rank, world,
    pad, fix_documents, multiple and pin.

    Raises: ConfigError where nothing is supervised, or the bins cannot be divided among the ranks.
    """
    if not dataset.supervised.sum():
        raise ConfigError(f"{dataset.path}: no token has a weight other than 0; look at [classes] and weights.source")
    identity.check_classes("[classes]", config.classes, dataset)
    identity.check_classes("samples.conditions", config.samples.conditions, dataset)
    asked = config.condition
    draws = ConditionDraws(dataset, asked, config.run.seed) if asked != ConditionConfig() else None
    with waiting("packing the conversations into steps"):
        return Loader(
            dataset,
            token_budget=config.data.token_budget,
            bins_per_step=config.data.bins_per_step,
            seed=config.run.seed,
            epochs=config.data.epochs,
            max_steps=config.data.max_steps,
            mixture=Mixture(dataset, config.data.mix, config.run.seed) if config.data.mix else None,
            costs=model.flops_per_sequence(dataset.lengths, dataset.supervised).astype(np.float32),
            conditions=draws,
            **place,
        )


def resolve(config: Config, inputs: RunInputs, ranks: Ranks) -> Resolved:
    """Decide every "auto" once: kernels, attention, recompute, learning rate, and the peak that MFU is relative to.

    Raises: ConfigError for a choice that the device cannot run.
    """
    model, device = inputs.model_config, ranks.device
    tokens = inputs.loader.num_steps * config.data.bins_per_step * config.data.token_budget
    flops, train = model.flops_per_step(tokens, 0, 0), config.train
    kernels = choices.kernels(train.kernels, device, flops, compiles=train.compile)
    attention, attention_reason = choose_attention(config, inputs, ranks)
    choices.linear(config.train.linear, device, model)
    choices.quantize(config.base.quantize, device)
    train = structs.replace(config.train, kernels=kernels, attention=attention)
    fullest = Workload(LengthCounts.of(np.array([config.data.token_budget])), supervised_share=1.0)
    planned = PlanInputs(model, fullest, 0, config.data, train, config.optim, config.parallel, config.lora, config.base)
    reduce, reduce_reason = choices.reduce(planned, ranks)
    parallel = structs.replace(config.parallel, reduce=reduce)
    recompute, reason = choices.recompute(replace(planned, parallel=parallel), ranks)
    supervised = inputs.loader.stats().supervised_per_step
    lr, lr_reason = schedule.choose_lr(config.optim.lr, supervised, model, lora=config.lora.rank > 0)
    train, optimizer = structs.replace(train, recompute=recompute), structs.replace(config.optim, lr=lr)
    decided = structs.replace(config, train=train, optim=optimizer, parallel=parallel)
    peak = metrics.peak_flops(device, config.train.peak_tflops, getattr(torch, config.train.dtype))
    return Resolved(config, decided, attention_reason, reason, reduce_reason, lr_reason, *peak)


def choose_attention(config: Config, inputs: RunInputs, ranks: Ranks) -> tuple[str, str]:
    """The backend of train.attention, and why it."""
    model, loader = inputs.model_config, inputs.loader
    dtype = getattr(torch, config.train.dtype)
    needs = Needs.of(model, dtype, config.run.deterministic, has_empty=loader.fix_documents)
    keep = Path(config.run.dir) / layout.ATTENTION
    return attention_choice.choose(config.train.attention, model, needs, ranks, lambda: loader.step(0)[0], keep)


def build_model(config: Config, inputs: RunInputs, ranks: Ranks) -> RunModel:
    """Model, adapters and optimizer of a resolved configuration: sharded and in memory, without values yet."""
    model_config, dtype = inputs.model_config, getattr(torch, config.train.dtype)
    ops = ochat_kernels.load(config.train.kernels)
    adapters = open_adapters(config, inputs)
    with torch.device("meta"):
        model = Transformer(model_config, ops).to(getattr(torch, config.optim.master_dtype))
    model.compute_dtype = dtype
    if config.train.linear == "fp8":
        model.use_fp8()
    if adapters:
        lora.attach(model.to(dtype), config.lora, adapters.token_ids)
    if config.base.quantize == "nf4":
        lora.quantize(model)
    sharding.wrap(model, ranks, config.train, config.parallel, dtype)
    model = model.to_empty(device="cpu" if config.parallel.offload == "all" else ranks.device)
    micro_batches = config.data.bins_per_step // ranks.world
    sharding.prepare_weights(model, ranks, config.train, config.parallel, micro_batches=micro_batches)
    offload = config.parallel.offload
    is_ours = config.train.kernels == "triton" and offload != "all"  # a kernel cannot reach host memory
    is_ours |= offload == "optimizer" or optim.needs_kernel(config.optim)
    optimizer = optim.build(
        model,
        config.optim,
        ops if is_ours else None,  # where it is faster or the only one that can, else torch's
        host_moments=offload == "optimizer",
        seed=config.run.seed,
    )
    average = WeightAverage(model, config.optim.ema) if config.optim.ema else None
    return RunModel(ops, adapters, model, optimizer, average, run_identity(config, inputs, adapters))


def open_adapters(config: Config, inputs: RunInputs) -> Adapters | None:
    """The adapters of a run that trains no more than them."""
    if config.lora.rank == 0:
        return None
    return Adapters.of(config.lora, config.base, inputs.model_config, inputs.template, inputs.tokenizer)


def run_identity(config: Config, inputs: RunInputs, adapters: Adapters | None) -> dict[str, Any]:
    """What a checkpoint and the run that resumes from it must have in common."""
    run = identity.identity(inputs.loader, inputs.model_config, config.data, config.run.seed)
    return run | (adapters.identity() if adapters else {})


def open_outputs(
    resolved: Resolved, inputs: RunInputs, parts: RunModel, ranks: Ranks, found: Manifest | None
) -> RunOutputs:
    """Everything that the run writes, continued after the checkpoint `found`; None: from the start."""
    config, run_dir, class_names = resolved.config, Path(resolved.config.run.dir), inputs.dataset.class_names
    lines = {name: JsonlWriter(run_dir / name if ranks.is_first else Path(os.devnull)) for name in layout.LINES}
    settings, num_steps = configuration.dump(resolved.asked), inputs.loader.num_steps
    if ranks.is_first:
        identity.record_config(run_dir, settings, step=found.step if found else 0, num_steps=num_steps)
        atomic.remove(run_dir / layout.SERVING)  # every checkpoint carries a copy
        eos_ids = serving.eos_ids_of(Path(config.base.path))
        serving.write(
            run_dir / layout.SERVING, inputs.template, inputs.tokenizer, class_names, eos_ids=eos_ids,
            condition_from=inputs.dataset.manifest.get("condition_from"),
        )  # fmt: skip
        if parts.adapters:
            parts.adapters.write_config(run_dir / layout.SERVING)
        for file in lines.values():
            metrics.truncate_after(file.path, found.step if found else -1)  # -1: an evaluation before step 1 too
        metrics.warn_of_lost_steps(lines[layout.METRICS].path, found.step if found else 0)

    def newest() -> Path | None:
        checkpointer.wait()
        return checkpointer.newest

    nonfinite = NonFiniteGuard(
        config.train.max_nonfinite_steps,
        lines[layout.NONFINITE] if ranks.is_first else None,
        bins_of=lambda step: identity.bins_of(inputs.loader, step - 1),
        newest=newest,
        in_backward=config.optim.in_backward,
        count=found.skipped if found else 0,
    )
    checkpointer = AsyncCheckpointer(
        run_dir,
        parts.model,
        parts.optimizer,
        parts.identity,
        ranks,
        config.checkpoint,
        lines=list(lines.values()),
        skipped_steps=lambda: nonfinite.count,
        ema=config.optim.ema,
        average=parts.average.values if parts.average else {},
    )
    checkpointer.newest = found.folder if found else None
    model = inputs.model_config
    metrics_log = MetricsLog(
        lines[layout.METRICS],
        class_names,
        flops=partial(lora.flops_per_step, model, config.lora) if parts.adapters else model.flops_per_step,
        peak_flops=resolved.peak_flops * ranks.world,
        device=ranks.device,
        nonfinite=nonfinite,
        has_dynamic=has_dynamic(config.loss),
    )
    log, on_gpu = config.log if ranks.is_first else LogConfig(), ranks.device.type == "cuda"
    display = Display(num_steps, log, run_dir, settings, done=found.step if found else 0, with_mfu=on_gpu)
    return RunOutputs(lines, checkpointer, metrics_log, display)
