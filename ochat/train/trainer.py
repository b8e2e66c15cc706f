"""Train a run: build, load, loop, step.

    ochat train CONFIG.toml --gpus 2 --run.dir=runs/a

The loss of a step is sum(w * nll) / sum |w| over all its bins, for any number of ranks and micro-batches. The step
number decides the data, so a checkpoint stores no loader state. Nothing in a step waits for the device; the metrics are
read from it every `train.log_every` steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from msgspec import structs
from ochat_kernels import Dynamic, LossOutput
from torch import Tensor

from ochat import console
from ochat.checkpoint import best
from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import Manifest
from ochat.checkpoint.measure import SETS
from ochat.config import HELD_OUT, Config
from ochat.data.batch import PackedBatch
from ochat.data.loader import Loader
from ochat.distributed import processes
from ochat.distributed.processes import Ranks
from ochat.distributed.watchdog import StopSignal, Watchdog
from ochat.errors import Interrupted
from ochat.export.hf_folder import export
from ochat.files import jsonl
from ochat.infer.generate import generate
from ochat.model import linear
from ochat.model.attention.packed import PackedAttention
from ochat.plan import tables
from ochat.plan.lengths import LengthCounts
from ochat.run import layout
from ochat.run.lock import acquire_run_dir
from ochat.text.conversation import Conversation, Message
from ochat.train import average, build, identity, metrics, optim, resolve, schedule, sharding, verify
from ochat.train.evaluations.exact import score
from ochat.train.loss import dynamic_at, head_loss
from ochat.train.metrics import StepMetrics

log = logging.getLogger(__name__)
RESCUE_S = 10.0  # an error that occurs on all ranks reaches them within it


def train(config: Config, run: Callable[[Trainer], None] | None = None) -> None:
    """Run the configured training from its newest checkpoint, or from the base model, to its last step; or call `run`
    with its trainer instead.

    Raises: ConfigError, DataError, CheckpointError before the first step for what a user can fix; NonFiniteError for
    one non-finite step too many; Interrupted after a signal, once the state is saved. If another process is gone or
    hangs, this process exits as RanksError describes.
    """
    resolve.determinism(config.run.deterministic, compiles=config.train.compile)
    ranks = processes.start(config.train, config.parallel)
    try:
        with Watchdog(ranks, config.parallel.timeout_s) as watchdog, acquire_run_dir(config.run, ranks) as run_dir:
            watchdog.set_dump_dir(run_dir)
            claimed = structs.replace(config, run=structs.replace(config.run, dir=str(run_dir)))
            (run or Trainer.run)(Trainer(claimed, ranks, watchdog))
    finally:
        processes.stop()


class Trainer:
    """One rank of a run."""

    def __init__(self, config: Config, ranks: Ranks, watchdog: Watchdog | None = None):
        torch.manual_seed(config.run.seed)
        self.ranks, self.run_dir = ranks, Path(config.run.dir)
        self.watchdog = watchdog or Watchdog(ranks, config.parallel.timeout_s)  # not entered: idle
        self.inputs = build.open_inputs(config, ranks)
        self.loader = self.inputs.loader
        self.resolved = build.resolve(config, self.inputs, ranks)
        self.config = self.resolved.config
        self.parts = build.build_model(self.config, self.inputs, ranks)
        self.model, self.optimizer = self.parts.model, self.parts.optimizer
        self.is_measuring = False
        self.model.register_forward_pre_hook(self.before_forward, prepend=True)  # before FSDP's
        found = self.load()
        self.steps_done = self.saved_step = found.step if found else 0
        self.outputs = build.open_outputs(self.resolved, self.inputs, self.parts, ranks, found)
        self.metrics, self.checkpointer = self.outputs.metrics, self.outputs.checkpointer
        self.stop_signal = StopSignal(ranks.world)

    def load(self) -> Manifest | None:
        """Fill model, optimizer and average from the checkpoint to resume from, which is returned, or else from the
        base."""
        run, base, adapters = self.config.run, Path(self.config.base.path), self.parts.adapters
        found = checkpoint.find_checkpoint(self.run_dir, run.resume, self.ranks)
        if found is not None and not run.resume_mismatched:
            checkpoint.check_identity(found, self.parts.identity)
        if found is None or adapters:
            verify.base(base, self.ranks)
            checkpoint.load_base(base, self.model)
        if found is not None:
            log.info(f"resuming from {found.folder}")
            optim.start_state(self.optimizer, found.step, found.skipped)
            averages = self.parts.average.values if self.parts.average else None
            checkpoint.load_state(found, self.model, self.optimizer.state, averages)
        elif adapters:
            adapters.start(self.model, run.seed)
        linear.fill_copies(self.model.parameters())
        average.take_up(self.parts.average, found)
        return found

    def run(self) -> None:
        """All remaining steps, with evaluations and checkpoints at their times; then the export."""
        self.announce()
        if self.steps_done == self.loader.num_steps:  # of more, announce has said it
            log.info(f"all {self.steps_done:,} steps were done before: nothing is trained")
        with self.stop_signal, self.checkpointer, self.outputs.display.bar(self.steps_done):
            if self.owes_evaluation():
                for name in layout.EVALUATION if self.ranks.is_first else ():  # some lines may be there
                    metrics.truncate_after(self.run_dir / name, self.steps_done - 1)
                self.measure()
            if self.steps_done < self.loader.num_steps and not self.is_over():  # it may be, where it was before
                self.watchdog.enter("planning the first epoch", timed=False)
                self.metrics.restart_clock()
                self.train_steps()
        self.finish()

    def train_steps(self) -> None:
        """The remaining steps, or those until it is over."""
        for step, batches in self.loader.iterate(self.steps_done):
            self.step(step, batches)
            if self.after(step):
                break

    def step(self, step: int, batches: list[PackedBatch]) -> None:
        """One optimizer step (`step` counts from 0) over this rank's micro-batches of it."""
        self.watchdog.enter(f"step {step + 1}")
        weight = torch.full((), sum(b.weight_sum for b in batches), dtype=torch.float64, device=self.ranks.device)
        weight = self.ranks.sum_tensor(weight).clamp_min(torch.finfo(torch.float32).tiny)
        measured = StepMetrics(self.inputs.dataset.class_names, self.ranks.device)
        lr = self.rate_at(step)
        dynamic = dynamic_at(self.config.loss, step, self.loader.num_steps)
        optim.begin(self.optimizer, lr=lr)
        for i, batch in enumerate(batches):
            batch = batch.to(self.ranks.device)
            is_last = i == len(batches) - 1
            sharding.begin_micro_batch(self.model, self.ranks, self.config.parallel, is_last=is_last)
            out = self.forward(batch, weight, dynamic)
            out.loss_sum.backward()
            measured.add(batch, out, weight)
        sums = self.ranks.sum_tensor(measured.to_tensor())
        settings = {"lr": lr, "clip": self.config.optim.clip, "average": self.parts.average}
        grad_norm = optim.update(self.optimizer, **settings, loss=sums[0])
        self.steps_done = step + 1
        self.metrics.add(self.steps_done, self.loader.position(step)[0], lr, sums, grad_norm)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return schedule.lr_at(step, self.loader.num_steps, self.config.optim)

    def forward(
        self, batch: PackedBatch, step_weight: Tensor | None = None, dynamic: Dynamic | None = None
    ) -> LossOutput:
        """The LossOutput of one micro-batch on the device, nll and correct (R,) of its supervised rows; `step_weight`
        and `dynamic`: as head_loss takes them."""
        backend, windows = self.config.train.attention, self.inputs.model_config.windows
        attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, backend, batch.lengths, windows)
        head = head_loss(self.parts.ops, self.model, batch, step_weight, dynamic)
        return self.model(batch.input_ids, batch.position_ids, attend, head=head, rows=batch.supervised_rows)

    def after(self, step: int) -> bool:
        """What is due after a step: log lines, a checkpoint, the end after a signal, and last, as it takes long and can
        fail, an evaluation. Whether the run is over before its last step."""
        done, last = self.steps_done, self.steps_done == self.loader.num_steps
        save = last or is_due(done, self.config.checkpoint.every, self.loader.epoch_end(step))
        measure = self.is_evaluation_due()
        stop = self.stop_signal.requested_anywhere() and not last
        if save or measure or stop or done % self.config.train.log_every == 0:
            self.outputs.display.steps(self.metrics.flush())
        if save:
            self.save()
        if stop:
            self.save_and_stop()
        if measure:
            self.measure()
        is_over = measure and not last and self.is_over()
        if is_over:
            self.save()
        self.checkpointer.report_if_done()
        if save or measure:
            self.metrics.restart_clock()
        return is_over

    def save(self) -> None:
        """Start the checkpoint of the steps done so far, unless there is one."""
        if self.saved_step < self.steps_done:
            self.watchdog.enter(f"saving step {self.steps_done}", timed=False)
            self.checkpointer.save(self.steps_done)
            self.saved_step = self.steps_done

    def save_and_stop(self) -> NoReturn:
        """Raises: Interrupted, once the state is on the disk."""
        self.save()
        if self.steps_done:
            self.checkpointer.finish()
        self.stop_signal.stop(self.steps_done)

    def before_forward(self, *_: Any) -> None:
        """At every micro-batch, and every token of an answer: progress, and inside an evaluation the end after a
        signal, on all ranks at the same place."""
        self.watchdog.heartbeat()
        if self.is_measuring and self.stop_signal.requested_anywhere():
            self.save_and_stop()

    def is_evaluation_due(self) -> bool:
        """Before the first step, where train.eval_every says, and after the last one."""
        done = self.steps_done
        if done in (0, self.loader.num_steps):
            return True
        return is_due(done, self.config.train.eval_every, self.loader.epoch_end(done - 1))

    def owes_evaluation(self) -> bool:
        """Whether the run stopped before or inside the evaluation of the steps done so far: its lines are not there."""
        if self.steps_done > self.loader.num_steps or not self.is_evaluation_due():
            return False
        files = {layout.EVAL: self.inputs.held_out or self.inputs.tasks, layout.SAMPLES: self.config.samples.prompts}
        paths = [self.outputs.lines[name].path for name, is_written in files.items() if is_written]
        return self.first_says(lambda: not all(jsonl.has_step(path, self.steps_done) for path in paths))

    def first_says(self, question: Callable[[], bool]) -> bool:
        """The first rank's answer, on all ranks."""
        answer = float(self.ranks.is_first and question())
        return bool(self.ranks.sum_tensor(torch.tensor(answer, device=self.ranks.device)))

    def is_over(self) -> bool:
        """Whether train.stop_after evaluations in a row were no better: the first rank reads eval.jsonl for all, so
        that it is the same after a resume."""
        most = self.config.train.stop_after
        why = best.no_better(self.run_dir, most) if most and self.ranks.is_first else ""
        if why:
            log.info(f"the run ends after step {self.steps_done:,} of {self.loader.num_steps:,}: {why}")
        return most > 0 and self.first_says(lambda: bool(why))

    def measure(self) -> None:
        """The evaluation after the steps done so far; neither a signal nor an error in it loses a step."""
        self.is_measuring = True
        try:
            with sharding.not_compiled(self.model):
                self.evaluate()
        except Interrupted:
            raise
        except Exception as error:
            self.rescue(error)
            raise
        finally:
            self.is_measuring = False

    def rescue(self, error: Exception) -> None:
        """Save what an evaluation that failed on all ranks would lose, and wait for a checkpoint that is on its way."""
        step, self.is_measuring = self.steps_done, False
        if self.saved_step < step and self.ranks.all_reach(f"failed evaluation {step}", RESCUE_S):
            self.save()
        self.checkpointer.wait()
        log.error(
            f"the evaluation after step {step:,} failed ({type(error).__name__}); "
            f"the same command resumes from {self.checkpointer.newest or 'the base'}"
        )

    def evaluate(self) -> None:
        """The held-out sets and exact-match tasks, and answers to the sample prompts, after the steps done so far. The
        lines are written once all is measured, so that a run that stops inside has none of them."""
        self.watchdog.enter(f"the evaluation after step {self.steps_done}")
        stamp, outputs = {"step": self.steps_done}, self.outputs
        measured = {name: self.held_out(loader) for name, loader in self.inputs.held_out.items()}
        exact = self.exact()
        measured |= {name: score(answers) for name, answers in exact.items()}
        samples = self.answers()
        outputs.lines[layout.ANSWERS].append(stamp | {"set": name} | each for name in exact for each in exact[name])
        outputs.lines[layout.SAMPLES].append(stamp | each for each in samples)
        if measured:
            line = stamp | measured.pop(HELD_OUT, {}) | ({SETS: measured} if measured else {})
            outputs.lines[layout.EVAL].append([line])
            outputs.display.evaluation(line)
        outputs.display.samples(samples)

    @torch.no_grad()
    def held_out(self, loader: Loader) -> dict[str, Any]:
        """Loss and accuracy over one pass of the loader and all ranks: {loss, accuracy, supervised_tokens, classes}; by
        the weights themselves, whatever [loss] makes of them."""
        measured = StepMetrics(loader.dataset.class_names, self.ranks.device)
        for _, batches in loader.iterate():
            for batch in batches:
                batch = batch.to(self.ranks.device)
                measured.add(batch, self.forward(batch))
        means = metrics.summarise(self.ranks.sum_tensor(measured.to_tensor()).tolist(), loader.dataset.class_names)
        return {key: means[key] for key in ("loss", "accuracy", "supervised_tokens", "classes")}

    def exact(self) -> dict[str, list[dict[str, Any]]]:
        """The answers to each task, lines of answers.jsonl. All ranks of a sharded model call it."""
        told = self.model, self.inputs.tokenizer, self.stop_ids, self.ranks.device
        return {name: task.answer(*told) for name, task in self.inputs.tasks.items()}

    @property
    def stop_ids(self) -> list[int]:
        """Where an answer ends."""
        return [self.inputs.tokenizer.special_tokens[self.inputs.template.eot]]

    def answers(self) -> list[dict[str, str]]:
        """Greedy answers to the configured prompts under each condition; all ranks of a sharded model call it."""
        config, template, tokenizer = self.config.samples, self.inputs.template, self.inputs.tokenizer
        conditions = config.conditions or self.inputs.dataset.class_names
        asked = [(prompt, condition) for prompt in config.prompts for condition in conditions]
        chats = [Conversation((Message("user", prompt, None),), condition=condition) for prompt, condition in asked]
        answers = generate(
            self.model,
            [template.encode_prompt(chat, tokenizer) for chat in chats],
            max_new_tokens=config.max_new_tokens,
            stop_ids=self.stop_ids,
            device=self.ranks.device,
        )
        return [
            {"prompt": prompt, "condition": condition, "answer": tokenizer.decode(ids)}
            for (prompt, condition), ids in zip(asked, answers, strict=True)
        ]

    def finish(self) -> None:
        """Export the trained model from its last checkpoint; every rank waits for it."""
        self.watchdog.enter("the export", timed=False)
        self.outputs.display.close()
        newest = self.checkpointer.finish()
        if self.ranks.is_first:
            export(newest, (self.run_dir / layout.EXPORT).resolve(), overwrite=True)
            log.info(f"exported {self.run_dir / layout.EXPORT}")
            console.next_command("ochat report", self.run_dir)
        self.ranks.all_gather_json({})  # NCCL's time-out is too short for the export of a large model

    def announce(self) -> None:
        """Show and record, before the first step, what will be done: plan, devices, kernels, learning rate."""
        if not self.ranks.is_first:
            return
        config, resolved, inputs = self.config, self.resolved, self.inputs
        source, model = config.weights.source, inputs.model_config
        has_negative = inputs.dataset.has_negative_weights()
        counts = LengthCounts.of(inputs.dataset.lengths[self.loader.plan(0).indices])
        for warning in (
            *tables.loss_warnings(config.loss, has_negative),
            *tables.length_notes(counts, config.data.token_budget, model.max_position_embeddings),
            *filter(
                None, [identity.schedule_warning(self.run_dir, self.steps_done, self.loader.num_steps, self.rate_at)]
            ),
        ):
            log.warning(warning)
        facts = tables.describe(self.loader, model, config.data, weights_source=source, lr_reason=resolved.lr_reason)
        facts |= {
            **tables.describe_loss(config.loss, has_negative),
            **(self.parts.adapters.facts(self.model) if self.parts.adapters else {}),
            **({"ema": self.parts.average.fact(self.loader.num_steps)} if self.parts.average else {}),
            "processes": f"{self.ranks.world} on {self.ranks.device.type}: {self.ranks.layout}",
            "computation": f"{config.train.dtype}, kernels {config.train.kernels}",
            "attention": resolved.attention_reason,
            "recompute": resolved.recompute_reason,
            **({"reduce": resolved.reduce_reason} if self.ranks.world > 1 else {}),
            "served as": inputs.template.default_condition or "(no condition)",
            "mfu is of": f"{resolved.peak_flops / 1e12:.4g} TFLOP/s a process, {resolved.peak_source}",
        }
        console.show(console.facts(f"run {self.run_dir}", facts))
        identity.write_plan(self.run_dir, self.loader, facts)


def is_due(done: int, every: int, epoch_end: bool) -> bool:
    """Whether something that happens every `every` steps (0: at the end of an epoch) is due after `done` steps."""
    return done % every == 0 if every else epoch_end
