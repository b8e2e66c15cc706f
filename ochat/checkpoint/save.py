"""Saving in the background: a step waits for the copy to host memory, a thread for the disk.

    saver.save(step);  ...steps...;  saver.poll();  ...;  newest = saver.finish()

Every rank writes its own shard into a temporary folder and tells the others how it went; where all succeeded, the first
adds manifest, model configuration and tokenizer, syncs, renames the folder, moves RUN/latest and only then removes old
checkpoints. Where one failed (a full disk), all know, the folder is gone, and training goes on to the next save. A
fault of ours is no full disk: it ends the run at the next look, with its traceback.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ochat.checkpoint import best as best_module
from ochat.checkpoint import load as checkpoint
from ochat.checkpoint.manifest import (
    KINDS,
    Manifest,
    copy_serving_files,
    describe_file,
    shard_file,
)
from ochat.checkpoint.pinned_safetensors import PinnedSafetensors
from ochat.config import CheckpointConfig
from ochat.distributed import local_shards
from ochat.distributed.processes import Ranks
from ochat.errors import CheckpointError, OchatError
from ochat.files import atomic
from ochat.files.jsonl import JsonlWriter
from ochat.model.transformer import Transformer
from ochat.run import layout
from ochat.run.nonfinite import NonFiniteGuard


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank."""

    step: int
    problem: str  # empty for a checkpoint that stands
    trouble: str  # what went wrong after it stood
    seconds: float


class Saver:
    """Writes checkpoints of one model and its optimizer; every rank has one and all call it at the same steps.

    Costs: host memory for this rank's masters and both moments (12 bytes a parameter it holds, 6 where all are bf16),
    kept for the run; pinned where the model is on a card, where torch rounds each file's buffer up to a power of two.
    """

    def __init__(
        self,
        run_dir: Path,
        model: Transformer,
        optimizer: Any,
        identity: dict[str, Any],
        ranks: Ranks,
        config: CheckpointConfig,
        *,
        lines: Sequence[JsonlWriter],
        bad_steps: NonFiniteGuard,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.run_dir, self.root = run_dir, run_dir / layout.CHECKPOINTS
        self.optimizer, self.model_config, self.identity = optimizer, model.config, identity
        self.ranks, self.config, self.lines, self.say, self.warn = ranks, config, lines, say, warn
        self.bad_steps, self._skipped = bad_steps, 0
        self.parameters = local_shards.trainable_parameters(model)  # before a forward replaces them by whole ones
        self.shard, self.num_shards, self.writes = ranks.shard
        self.rows = {name: local_shards.row_range(parameter) for name, parameter in self.parameters.items()}
        self.files: dict[str, PinnedSafetensors] = {}  # by kind, laid out at the first save
        self.newest: Path | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | Exception | None = None  # of the thread
        self._failed: Outcome | None = None  # the last save, if it failed
        if ranks.is_first:
            atomic.remove_leftovers(self.root, layout.STEP_PREFIX)

    def save(self, step: int) -> None:
        """Starts a checkpoint of `step` done steps, once the one before is on the disk or has failed.

        Costs: waits for the copy to host memory.
        """
        if self._thread is not None and self._thread.is_alive():
            self.say(f"the checkpoint of step {step} waits until the one before is written")
        self.wait()
        self._skipped = self.bad_steps.count
        copied = self._attempt(self._copy)
        self._thread = threading.Thread(target=self._run, args=(step, copied), name=f"save step {step}", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Reports a save that has ended since the last look; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until the save in hand has ended; reports how.

        Raises: what was no fault of a disk: a fault of ours, or of the network where another process is gone.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, outcome = None, self._outcome
        assert outcome is not None
        if isinstance(outcome, Exception):
            raise outcome
        if outcome.problem:
            self._failed = outcome
            self.warn(
                f"the checkpoint of step {outcome.step} could NOT be saved: {outcome.problem}. Training goes on; the "
                f"next save tries again, and until then a restart goes on from {self.newest or 'the start'}"
            )
        else:
            self._failed, self.newest = None, self._folder(outcome.step)
            self.say(f"saved {self.newest}, in {outcome.seconds:.1f} s beside the training")
            if outcome.trouble:
                self.warn(f"{self.newest} is saved, but {layout.LATEST} or the old checkpoints: {outcome.trouble}")

    def finish(self) -> Path:
        """The newest checkpoint, once it is on the disk. Raises: CheckpointError if the last save failed."""
        self.wait()
        if self._failed is not None:
            raise CheckpointError(
                f"the last checkpoint, of step {self._failed.step}, could not be saved: {self._failed.problem}. Make "
                f"room and start the same command again: it goes on from {self.newest or 'the start'}"
            )
        assert self.newest is not None
        return self.newest

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets a save in hand end, unless the run dies of something that the other ranks may not know of."""
        if kind is None or issubclass(kind, OchatError):
            self.wait()

    def _folder(self, step: int) -> Path:
        return self.root / f"step_{step}"

    def _copy(self) -> dict[str, Any]:
        """Masters and moments to the host files, which the first save lays out; waiting lines to the disk."""
        for file in self.lines:  # a checkpoint promises those up to its step
            file.flush()
        if not self.writes:
            return {}
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for (kind, stored, _), tensor in checkpoint.slices(name, parameter, state).items():
                if tensor.shape[0]:
                    tensors[kind][stored] = tensor.detach()
        for kind in KINDS:
            if kind not in self.files:
                self.files[kind] = PinnedSafetensors(tensors[kind])
            self.files[kind].snapshot(tensors[kind])
        if self.ranks.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return {}

    def _run(self, step: int, copied: dict[str, Any]) -> None:
        """The thread: its outcome, or what the main thread is to raise."""
        try:
            self._outcome = self._write(step, copied)
        except Exception as error:
            self._outcome = error

    def _write(self, step: int, copied: dict[str, Any]) -> Outcome:
        """Writes, agrees, publishes, agrees again. A disk that refuses anywhere is every rank's outcome."""
        started, temporary = time.monotonic(), self.root / f".step_{step}.tmp"
        written = self.ranks.all_gather_json(copied or self._attempt(lambda: self._write_shard(temporary)))
        problem, answer = _first_problem(written), {}
        if self.ranks.is_first:
            if not problem:
                answer = self._attempt(lambda: self._publish(step, temporary, written))
            shutil.rmtree(temporary, ignore_errors=True)
        answer = self.ranks.all_gather_json(answer)[0]
        problem = problem or answer.get("problem", "")
        return Outcome(step, problem, answer.get("trouble", ""), time.monotonic() - started)

    def _attempt(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return work()
        except (OSError, OchatError) as error:  # the other ranks wait to hear of it
            return {"problem": f"process {self.ranks.rank}: {type(error).__name__}: {error}"}

    def _write_shard(self, folder: Path) -> dict[str, Any]:
        """This rank's files; returns their sizes and checksums, and the rows they hold."""
        if not self.writes:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        names = {kind: shard_file(kind, self.shard, self.num_shards) for kind in KINDS}
        files = {name: self.files[kind].write(folder / name) for kind, name in names.items()}
        return {"files": files, "rows": {name: rows for name, rows in self.rows.items() if rows[0] < rows[1]}}

    def _publish(self, step: int, temporary: Path, written: list[dict[str, Any]]) -> dict[str, Any]:
        """Completes the folder and gives it its name; only then do `latest` and old checkpoints move."""
        written = [record for record in written if record]
        atomic.write_json(temporary / "config.json", self.model_config.to_hf())
        copy_serving_files(self.run_dir / layout.SERVING, temporary)
        files = {name: described for record in written for name, described in record["files"].items()}
        for path in sorted(temporary.iterdir()):
            if path.name not in files:
                files[path.name] = describe_file(path)
                atomic.fsync(path)
        if lost := [name for name in files if not (temporary / name).is_file()]:
            raise CheckpointError(f"{temporary}: {lost[0]} is not there; all processes need the same run folder")
        parameters = {
            name: {"shape": list(parameter.shape), "dtype": checkpoint.dtype_name(parameter)}
            for name, parameter in self.parameters.items()
        }
        shards = [record["rows"] for record in written]
        Manifest(temporary, step, self.identity, self.ranks.world, parameters, shards, files, self._skipped).write()
        for lines in self.lines:
            if lines.path.exists():
                atomic.fsync(lines.path)
        atomic.replace_dir(temporary, self._folder(step))
        return {"trouble": self._attempt(lambda: self._tidy(step)).get("problem", "")}

    def _tidy(self, step: int) -> dict[str, Any]:
        """Moves `latest`; then goes all but the newest `keep` (0: all stay), those of every `keep_every`-th step, and
        the best so far."""
        atomic.write_text(self.run_dir / layout.LATEST, f"{layout.CHECKPOINTS}/step_{step}\n")
        keep, every = self.config.keep, self.config.keep_every
        there = {layout.step_of(folder): folder for folder in layout.checkpoint_folders(self.run_dir)}
        best = self._best_step() if self.config.keep_best else None
        for number in [n for n in there if n <= step][:-keep] if keep else []:  # a later one is a damaged one
            if number != best and (not every or number % every):
                atomic.remove_dir(there[number])
        return {}

    def _best_step(self) -> int | None:
        """Of the checkpoints that are there, the step with the lowest held-out loss of the expert class."""
        measured = [each for each in best_module.read(self.run_dir) if each.checkpoint]
        best = best_module.best(measured, best_module.expert(self.run_dir, measured))
        return best.step if best else None


def _first_problem(records: list[dict[str, Any]]) -> str:
    return next((record["problem"] for record in records if "problem" in record), "")
