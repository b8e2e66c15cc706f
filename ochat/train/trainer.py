"""The story of a run: build, load, loop, step.

    torchrun --nproc-per-node 2 -m ochat.train CONFIG.toml --run.dir=runs/a   (one process: ochat train CONFIG.toml)

The loss of a step is sum(w * nll) / sum |w| over all its bins, whatever the number of ranks and micro-batches. The
step number decides the data, so a checkpoint holds no loader. Nothing in a step waits on the host except the journal's
flush.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ochat_kernels
import torch
from ochat_kernels import LossOutput

from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.save import Saver
from ochat.config import Config
from ochat.data.batch import PackedBatch
from ochat.data.loader import Loader
from ochat.distributed import processes
from ochat.distributed.processes import Ranks
from ochat.distributed.signals import StopSignal
from ochat.distributed.watchdog import Watchdog
from ochat.export.hf_folder import export
from ochat.files.jsonl import LineFile
from ochat.model.attention import PackedAttention
from ochat.model.config import ModelConfig
from ochat.plan import run_facts
from ochat.run import config_history, layout, run_folder
from ochat.run.nonfinite import BadSteps
from ochat.text import tokenizer as tokenizers
from ochat.train import (
    build,
    determinism,
    evaluate,
    identity,
    inputs,
    metrics,
    optim,
    recompute,
    schedule,
    sharding,
    verify,
)
from ochat.train.adapters import Adapters
from ochat.train.display import Display
from ochat.train.loss import head_loss
from ochat.train.metrics import Journal, Tally
from ochat.train.trackers import Trackers


def train(config: Config, run: Callable[[Trainer], None] | None = None) -> None:
    """Runs the configured training from its newest checkpoint (or the base model) to its last step; or does something
    else, `run`, with its trainer.

    Raises: ConfigError, DataError, CheckpointError before the first step for what a user can mend; NonFiniteError at
    a bad step too many; Interrupted after a signal, once the state is saved. Where another process is gone or hangs,
    this one ends as RanksError says.
    """
    determinism.apply(config)
    ranks = processes.start(config.train, config.parallel)
    try:
        with (
            Watchdog(ranks, config.parallel.timeout_s) as watchdog,
            run_folder.claim(config, ranks, Display(show=ranks.is_first).warn) as resolved,
        ):
            watchdog.set_dump_dir(Path(resolved.run.dir))
            (run or Trainer.run)(Trainer(resolved, ranks, watchdog))
    finally:
        processes.stop()


class Trainer:
    """Everything of one run on this rank."""

    def __init__(self, config: Config, ranks: Ranks, watchdog: Watchdog | None = None):
        self.config, self.ranks, self.run_dir = config, ranks, Path(config.run.dir)
        self.watchdog = watchdog or Watchdog(ranks, config.parallel.timeout_s)  # not entered: idle
        self.display = Display(show=ranks.is_first)
        torch.manual_seed(config.run.seed)
        optim.check(config.optim, ranks.world)
        self.model_config = ModelConfig.load(config.base.path)
        self.pads = ranks.device.type == "cuda"  # constant shapes pay there; a CPU would compute the padding
        verify.data(config, ranks, self.display.note)
        self.data = inputs.open_data(config)
        self.loader = inputs.open_loader(
            config, self.data, self.model_config, rank=ranks.rank, world=ranks.world, pad=self.pads
        )
        self.eval_loader = self._open_eval_loader()
        self.tokenizer = tokenizers.load(config.base.path)
        identity.check_data(self.data, self.eval_loader, self.tokenizer, self.model_config, config)
        self.template = inputs.served_template(self.data)
        self.adapters = Adapters.of(config, self.model_config, self.template, self.tokenizer)
        self.identity = identity.identity(config, self.model_config, self.loader) | self.adapters.identity()
        self.kernels = build.kernels_name(config, ranks.device)
        self.config, self.recompute = recompute.resolve_recompute(config, self.model_config, ranks, self.kernels)
        self.ops = ochat_kernels.load(self.kernels)
        self.backend = build.attention_name(config, ranks.device)
        verify.headers(config, self.model_config, self.run_dir)
        self.model = build.build_model(self.config, self.model_config, self.ops, ranks, self.adapters)
        self.model.register_forward_pre_hook(lambda *_: self.watchdog.heartbeat())
        self.optimizer = build.build_optimizer(config, self.model, self.ops, ranks, self.kernels)
        self.lines = {name: LineFile(self.run_dir / name, self.display.warn) for name in layout.LINES}
        self.bad_steps = self._open_bad_steps()
        self.saver = self._open_saver()
        self.steps_done = self._load()
        if ranks.is_first:
            num_steps = self.loader.num_steps
            config_history.keep(self.run_dir, config, step=self.steps_done, num_steps=num_steps, say=self.display.note)
            identity.describe(self.run_dir, self.template, self.tokenizer, self.data.class_names)
            self.adapters.describe(self.run_dir)
        self.lr = inputs.choose_lr(config, self.loader, self.model_config)
        self.journal = self._open_journal()
        self.trackers = Trackers(config, self.run_dir, enabled=ranks.is_first)
        self.stop_signal = StopSignal(ranks.world)

    def run(self) -> None:
        """All remaining steps, with evaluations and checkpoints at their times; ends with an export."""
        self.announce()
        if self.steps_done == self.loader.num_steps:
            self.display.note(f"all {self.steps_done:,} steps were done before: nothing is trained")
        with self.stop_signal, self.saver, self.display.progress(self.steps_done, self.loader.num_steps):
            if self.steps_done == 0:
                self.evaluate()
            self.watchdog.enter("planning the first epoch", timed=False)
            self.journal.restart_clock()
            for step, batches in self.loader.iterate(self.steps_done):
                self.step(step, batches)
                self.after(step)
        self.finish()

    def step(self, step: int, batches: list[PackedBatch]) -> None:
        """One optimizer step (`step` counts from 0) over this rank's micro-batches of it."""
        self.watchdog.enter(f"step {step + 1}")
        weight = torch.full((), sum(b.weight_sum for b in batches), dtype=torch.float64, device=self.ranks.device)
        weight = self.ranks.sum_tensor(weight).float().clamp_min(torch.finfo(torch.float32).tiny)
        tally = Tally(self.data.class_names, self.ranks.device)
        lr = self.lr.value * self._lr_factor(step)
        optim.begin(self.optimizer, lr=lr)
        for i, batch in enumerate(batches):
            batch = batch.to(self.ranks.device)
            is_last = i == len(batches) - 1
            sharding.begin_micro_batch(self.model, self.ranks, self.config.parallel, is_last=is_last)
            out = self.forward(batch)
            (out.loss_sum / weight).backward()
            tally.add(batch, out)
        sums = self.ranks.sum_tensor(tally.flat())
        grad_norm = optim.update(self.optimizer, lr=lr, clip=self.config.optim.clip, loss=sums[0])
        self.steps_done = step + 1
        self.journal.add(self.steps_done, self.loader.position(step)[0], lr, sums, grad_norm)

    def forward(self, batch: PackedBatch) -> LossOutput:
        """The LossOutput of one micro-batch on the device, nll and correct (R,) of its supervised rows."""
        attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, self.backend, batch.lengths)
        head = head_loss(self.ops, batch, self.model.head.tokens)
        return self.model(batch.input_ids, batch.position_ids, attend, head=head, rows=batch.supervised_rows)

    def after(self, step: int) -> None:
        """What is due after a step: the log lines, an evaluation, a checkpoint, the end after a signal."""
        done, last = self.steps_done, self.steps_done == self.loader.num_steps
        epoch_end = self.loader.epoch_end(step)
        save = last or due(done, self.config.checkpoint.every, epoch_end)
        measure = last or due(done, self.config.train.eval_every, epoch_end)
        stop = self.stop_signal.requested_anywhere() and not last
        if save or measure or stop or done % self.config.train.log_every == 0:
            lines = self.journal.flush()
            self.display.steps(lines, self.loader.num_steps)
            self.trackers.add("train", lines)
        if measure:
            self.evaluate()
        if save or stop:
            self.watchdog.enter(f"saving step {done}", timed=False)
            self.saver.save(done)
        if stop:
            self.saver.finish()
            self.stop_signal.stop(done)
        self.saver.poll()
        if save or measure:
            self.journal.restart_clock()

    def evaluate(self) -> None:
        """Held-out loss per class and answers to the sample prompts, after the steps done so far."""
        self.watchdog.enter(f"the evaluation after step {self.steps_done}")
        stamp = {"step": self.steps_done}
        if self.eval_loader is not None:
            line = stamp | evaluate.held_out(self.forward, self.eval_loader, self.ranks)
            self._append("eval.jsonl", [line])
            self.display.evaluation(line)
            self.trackers.add("held_out", [line])
        answers = evaluate.answer(
            self.model,
            self.template,
            self.tokenizer,
            self.config.samples,
            self.data.class_names,
            self.ranks.device,
        )
        self._append("samples.jsonl", [stamp | answer for answer in answers])
        self.display.samples(answers)

    def finish(self) -> None:
        """Exports the trained model from its last checkpoint; every rank waits for it."""
        self.watchdog.enter("the export", timed=False)
        self.trackers.close()
        newest = self.saver.finish()
        if self.ranks.is_first:
            export(newest, self.run_dir / "export", overwrite=True)
            self.display.note(f"exported {self.run_dir / 'export'}")
            self.display.note(f"look at it: ochat report {self.run_dir}")
        self.ranks.all_gather_json({})  # a collective of the cards would time out before a large model is exported

    def announce(self) -> None:
        """Says and writes down what will be done, before the first step: the plan, the devices, the kernels, the
        learning rate and its reason."""
        if not self.ranks.is_first:
            return
        facts = run_facts.describe(
            self.loader,
            self.model_config,
            self.config.data,
            weights_source=self.config.weights.source,
            lr_reason=self.lr.reason,
        )
        facts |= self.adapters.facts(self.model) | {
            "processes": f"{self.ranks.world} on {self.ranks.device.type}: {self.ranks.layout}",
            "computation": f"{self.config.train.dtype}, kernels {self.kernels}, attention {self.backend}",
            "recompute": self.recompute,
            "served as": self.template.default_condition or "(no condition)",
            "mfu is of": f"{self.peak / 1e12:.4g} TFLOP/s a process, {self.peak_source}",
        }
        self.display.table(f"run {self.run_dir}", facts)
        identity.write_plan(self.run_dir, self.loader, facts)

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        if self.ranks.is_first and lines:
            self.lines[name].append(lines)

    def _load(self) -> int:
        found = checkpoint.find(self.run_dir, self.config.run.resume, self.ranks, self.display.warn)
        if found is not None and not self.config.run.resume_mismatched:
            checkpoint.check_identity(found, self.identity)
        if found is None or self.adapters.are_on:
            verify.base(Path(self.config.base.path), self.ranks, self.display.note)
            checkpoint.load_base(Path(self.config.base.path), self.model)
        if found is None:
            self.adapters.start(self.model)
            return 0
        self.saver.newest, self.bad_steps.count = found.folder, found.skipped
        self.display.note(f"resuming from {found.folder}")
        return checkpoint.load(found, self.model, self.optimizer)

    def _open_saver(self) -> Saver:
        return Saver(
            self.run_dir,
            self.model,
            self.optimizer,
            self.identity,
            self.ranks,
            self.config.checkpoint,
            lines=list(self.lines.values()),
            bad_steps=self.bad_steps,
            say=self.display.note,
            warn=self.display.warn,
        )

    def _open_bad_steps(self) -> BadSteps:
        def newest() -> Path | None:
            self.saver.wait()
            return self.saver.newest

        return BadSteps(
            self.config.train.max_nonfinite_steps,
            self.lines[layout.BAD_STEPS] if self.ranks.is_first else None,
            bins_of=lambda step: identity.bins_of(self.loader, step - 1),
            newest=newest,
            warn=self.display.warn,
            in_backward=self.config.optim.in_backward,
        )

    def _open_eval_loader(self) -> Loader | None:
        if not self.config.data.eval_path:
            return None
        data = inputs.open_eval_data(self.config)
        return inputs.open_eval_loader(self.config, data, rank=self.ranks.rank, world=self.ranks.world, pad=self.pads)

    def _open_journal(self) -> Journal:
        if self.ranks.is_first:
            for file in self.lines.values():  # -1: what was measured before step 1 comes again
                metrics.cut(file.path, self.steps_done or -1)
        dtype = getattr(torch, self.config.train.dtype)
        self.peak, self.peak_source = metrics.peak_flops(self.ranks.device, self.config.train.peak_tflops, dtype)
        return Journal(
            self.lines["metrics.jsonl"],
            self.data.class_names,
            flops=self.adapters.flops_per_step,
            peak_flops=self.peak * self.ranks.world,
            device=self.ranks.device,
            write=self.ranks.is_first,
            bad_steps=self.bad_steps,
        )

    def _lr_factor(self, step: int) -> float:
        optim_config = self.config.optim
        return schedule.factor(
            step, self.loader.num_steps, warmup_ratio=optim_config.warmup_ratio, min_lr_ratio=optim_config.min_lr_ratio
        )


def due(done: int, every: int, epoch_end: bool) -> bool:
    """Whether something that happens every `every` steps (0: at the end of an epoch) is due after `done` steps."""
    return done % every == 0 if every else epoch_end
