"""Save checkpoints in the background: a step waits for the copy to host memory, a thread for the disk.

    checkpointer.save(step);  ...steps...;  checkpointer.report_if_done();  ...;  newest = checkpointer.finish()

Every rank writes its own shard into a temporary folder and shares how it went. Where all succeeded, the first rank adds
manifest, model configuration and serving files, syncs, renames the folder, updates RUN/latest and only then removes old
checkpoints. Where one failed (a full disk), the folder is removed and training continues to the next save. A bug of
ours is no full disk: it ends the run at the next call, with its traceback.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ochat import background
from ochat.checkpoint import best
from ochat.checkpoint.load import dtype_name, stored_tensors
from ochat.checkpoint.manifest import EMA, KINDS, File, Manifest, Parameter, copy_serving_files, shard_file
from ochat.config import CheckpointConfig
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, OchatError
from ochat.files import atomic, checksums
from ochat.files.jsonl import JsonlWriter
from ochat.files.safetensors_file import PinnedSafetensors
from ochat.model.transformer import Transformer
from ochat.run import layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank."""

    step: int
    problem: str  # why there is no checkpoint; empty for one that is complete
    warning: str  # what failed after it was complete
    seconds: float


@dataclass(eq=False)
class AsyncCheckpointer:
    """Writes checkpoints of one model, its optimizer and, if there is one, the average of its weights; every rank has
    one and all call it at the same steps.

    Costs: host memory for this rank's masters and both moments (12 bytes a parameter it holds, 6 where all are bf16; 4
    more for the average), kept for the run; pinned where the model is on a card, where torch rounds each file's buffer
    up to a power of two.
    """

    run_dir: Path
    model: Transformer
    optimizer: Any
    identity: dict[str, Any]
    ranks: Ranks
    config: CheckpointConfig
    lines: Sequence[JsonlWriter]
    skipped_steps: Callable[[], int]
    ema: float = 0.0  # optim.ema
    average: Mapping[Tensor, Tensor] = field(default_factory=dict)  # of each parameter; empty where ema is 0

    def __post_init__(self) -> None:
        self.root = self.run_dir / layout.CHECKPOINTS
        self.parameters = local_shards.trainable_parameters(self.model)  # before a forward replaces them by whole ones
        self.shard, self.num_shards, self.writes = self.ranks.shard
        self.kinds = (*KINDS, EMA) if self.ema else KINDS
        self.files: dict[str, PinnedSafetensors] = {}  # by kind, laid out at the first save
        self.newest: Path | None = None
        self._saving: Future[Outcome] | None = None
        self._failed: Outcome | None = None  # the last save, if it failed
        if self.ranks.is_first:
            atomic.remove_leftovers(self.root, layout.STEP_PREFIX)

    def save(self, step: int) -> None:
        """Starts a checkpoint of `step` completed steps, once the one before is on the disk or has failed.

        Costs: waits for the copy to host memory.
        """
        if self._saving is not None and not self._saving.done():
            log.info("the checkpoint of step %d waits until the one before is written", step)
        self.wait()
        skipped, copied = self.skipped_steps(), self._attempt(self._copy)
        self._saving = background.start(lambda: self._write(step, skipped, copied), f"save step {step}")

    def report_if_done(self) -> None:
        """Logs how a save ended that has ended since the last call; never waits."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress and logs how it ended.

        Raises: any error that is not a disk's: a bug of ours, or of the network where another process is gone.
        """
        if self._saving is None:
            return
        outcome, self._saving = self._saving.result(), None
        if outcome.problem:
            self._failed = outcome
            log.warning(
                "the checkpoint of step %d could NOT be saved: %s. Training continues; the next save tries again, and "
                "until then a restart resumes from %s", outcome.step, outcome.problem, self.newest or "the start",
            )  # fmt: skip
            return
        self._failed, self.newest = None, self.root / layout.checkpoint_name(outcome.step)
        log.info("saved %s, in %.1f s during training", self.newest, outcome.seconds)
        if outcome.warning:
            log.warning("%s is saved, but %s or the old checkpoints: %s", self.newest, layout.LATEST, outcome.warning)

    def finish(self) -> Path:
        """The newest checkpoint, once it is on the disk. Raises: CheckpointError if the last save failed."""
        self.wait()
        if self._failed is not None:
            raise CheckpointError(
                f"the last checkpoint, of step {self._failed.step}, could not be saved: {self._failed.problem}. Make "
                f"room and start the same command again: it resumes from {self.newest or 'the start'}"
            )
        assert self.newest is not None
        self._tidy()
        return self.newest

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for the save in progress, unless the run fails by an error that the other ranks may not have."""
        if kind is None or issubclass(kind, OchatError):
            self.wait()

    def _copy(self) -> None:
        """Copies masters, moments and averages to host memory and flushes waiting lines: a checkpoint promises those up
        to its step."""
        for file in self.lines:
            file.flush()
        if not self.writes:
            return
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter], self.average.get(parameter)
            for (kind, stored), tensor in stored_tensors(name, parameter, *state).items():
                if tensor.shape[0]:
                    tensors[kind][stored] = tensor.detach()
        for kind in self.kinds:
            if kind not in self.files:
                self.files[kind] = PinnedSafetensors(tensors[kind])
            self.files[kind].snapshot(tensors[kind])
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _write(self, step: int, skipped: int, copied: dict[str, Any]) -> Outcome:
        """Writes, agrees, publishes, agrees again. A disk error on any rank is every rank's outcome."""
        started, temporary = time.monotonic(), self.root / f".{layout.checkpoint_name(step)}.tmp"
        self._tidy()
        written = self.ranks.all_gather_json(copied or self._attempt(lambda: self._write_shard(temporary)))
        problem = next((record["problem"] for record in written if "problem" in record), "")
        answer = {"problem": problem} if problem else {}
        if self.ranks.is_first:
            answer = answer or self._attempt(lambda: self._publish(step, skipped, temporary, written))
            atomic.remove(temporary)
        answer = {"problem": "", "warning": ""} | self.ranks.all_gather_json(answer)[0]
        return Outcome(step, answer["problem"], answer["warning"], time.monotonic() - started)

    def _attempt(self, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """What `work` returns, or its problem."""
        try:
            return work() or {}
        except (OSError, OchatError) as error:  # the other ranks wait for it
            return {"problem": f"process {self.ranks.rank}: {type(error).__name__}: {error}"}

    def _write_shard(self, folder: Path) -> dict[str, Any]:
        """Writes this rank's files; returns their sizes and checksums, and the rows they hold."""
        if not self.writes:
            return {}
        atomic.make_dir(folder)
        names = {kind: shard_file(kind, self.shard, self.num_shards) for kind in self.kinds}
        files = {name: self.files[kind].write(folder / name) for kind, name in names.items()}
        rows = {name: local_shards.row_range(parameter) for name, parameter in self.parameters.items()}
        return {"files": files, "rows": {name: (first, end) for name, (first, end) in rows.items() if first < end}}

    def _publish(self, step: int, skipped: int, temporary: Path, written: list[dict[str, Any]]) -> dict[str, Any]:
        """Completes the folder and renames it; only then are `latest` and old checkpoints changed."""
        written = [record for record in written if record]
        atomic.write_json(temporary / "config.json", self.model.config.to_hf())
        copy_serving_files(self.run_dir / layout.SERVING, temporary)
        files = {name: described for record in written for name, described in record["files"].items()}
        for path in sorted(temporary.iterdir()):
            if path.name not in files:
                files[path.name] = File(bytes=path.stat().st_size, sha256=checksums.sha256(path))
                atomic.fsync(path)
        if lost := [name for name in files if not (temporary / name).is_file()]:
            raise CheckpointError(f"{temporary}: {lost[0]} is not there; all processes need the same run folder")
        whole = {name: Parameter(shape=[*p.shape], dtype=dtype_name(p)) for name, p in self.parameters.items()}
        shards = [record["rows"] for record in written]
        Manifest(temporary, step, self.identity, self.ranks.world, whole, shards, files, skipped, self.ema).write()
        for lines in self.lines:
            if lines.path.exists():
                atomic.fsync(lines.path)
        atomic.replace_dir(temporary, self.root / layout.checkpoint_name(step))
        return {"warning": self._attempt(lambda: self._settle(step)).get("problem", "")}

    def _settle(self, step: int) -> None:
        """Updates `latest`, then removes old checkpoints."""
        atomic.write_text(self.run_dir / layout.LATEST, f"{layout.CHECKPOINTS}/{layout.checkpoint_name(step)}\n")
        self._prune(step)

    def _tidy(self) -> None:
        """Removes the checkpoint that was the best until the newest one, saved before its evaluation, was better."""
        if self.config.keep_best and self.ranks.is_first and self.newest and self.newest.parent == self.root:
            step = layout.step_of(self.newest)
            if problem := self._attempt(lambda: self._prune(step)):
                log.warning("old checkpoints could not be removed: %s", problem["problem"])

    def _prune(self, step: int) -> None:
        """Removes checkpoints up to `step`, except the newest `keep` (0: all), those of every `keep_every`-th step, and
        the best so far."""
        keep, every = self.config.keep, self.config.keep_every
        there = {layout.step_of(folder): folder for folder in layout.checkpoint_folders(self.run_dir)}
        best_step = best.best_step(self.run_dir) if self.config.keep_best else None
        for number in [n for n in there if n <= step][:-keep] if keep else []:  # a later one is a damaged one
            if number != best_step and (not every or number % every):
                atomic.remove_dir(there[number])
