"""What a run folder tells, as far as it is there: each file may be missing, half-written, or anybody's.

run = RunRecord(Path("runs/a"), "a");  run.refresh();  run.state;  run.metrics["loss"]
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat import typed_toml
from ochat.errors import ConfigError
from ochat.report.columns import Columns
from ochat.train import evaluations, folder_lock, line_file
from ochat.train.evaluations import ALL, Evaluation
from ochat.train.line_file import number

FILES = ("config.toml", "plan.json", "metrics.jsonl", "eval.jsonl", "samples.jsonl", "bad_steps.jsonl", "swap.json")
MAX_BYTES = 1 << 24  # of the files that are read whole


class RunRecord:
    """One run; `refresh` reads what is new."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises: ConfigError for a folder that holds no run."""
        if not any((folder / file).is_file() for file in ("config.toml", "metrics.jsonl")):
            raise ConfigError(f"{folder}: no run is there; name a run folder, with config.toml and metrics.jsonl")
        self.folder, self.name = folder, name
        self.metrics = Columns(folder / "metrics.jsonl")
        self.notes: list[str] = []  # what could not be read

    def refresh(self) -> None:
        """Reads what came since the last time. Raises: OSError."""
        self.notes = []
        self.is_live = folder_lock.is_held(self.folder)
        self.metrics.refresh()
        self.config_text = self._text("config.toml")
        self.config, self.plan, self.swap = self._config(), self._object("plan.json"), self._object("swap.json")
        self.evaluations: list[Evaluation] = evaluations.read(self.folder)
        self.best_by = evaluations.expert(self.folder, self.evaluations)
        self.best = evaluations.best(self.evaluations, self.best_by)
        self.samples = line_file.read(self.folder / "samples.jsonl")
        self.bad_steps = line_file.read(self.folder / "bad_steps.jsonl")
        if self.metrics.num_unreadable:
            self.notes.append(f"{self.metrics.num_unreadable:,} lines of metrics.jsonl could not be read")

    @property
    def steps(self) -> NDArray[np.float64]:
        """(n,): the number of each line's step."""
        return self.metrics["step"]

    @property
    def num_done(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def num_planned(self) -> int | None:
        """Steps of the whole run, if it is written anywhere."""
        planned = number(self.plan.get("num_steps")) or number(self.setting("data.max_steps"))
        return int(planned) if planned else None

    @property
    def state(self) -> str:
        """running, ended, or stopped."""
        if self.is_live:
            return "running"
        ended = self.num_done >= self.num_planned if self.num_planned else (self.folder / "export").is_dir()
        return "ended" if ended else "stopped"

    def epochs_at(self, step: int) -> float | None:
        """Passes over the data that were done after `step` steps; None where the plan does not say."""
        planned = self.plan.get("steps_per_epoch")
        counts = [number(each) for each in planned] if isinstance(planned, list) else []
        if not counts or any(each is None or each <= 0 for each in counts):
            return None
        ends = np.cumsum([0.0, *counts])  # type: ignore[list-item]
        return float(np.interp(step, ends, np.arange(len(ends))))

    @property
    def fill(self) -> NDArray[np.float64]:
        """(n,): tokens of a step over what its bins hold; NaN where the configuration does not say."""
        room = (number(self.setting(f"data.{key}")) or np.nan for key in ("token_budget", "bins_per_step"))
        return self.metrics["tokens"] / np.prod(list(room))

    @property
    def settings(self) -> dict[str, Any]:
        """Every value of the configuration by its dotted name."""
        return dict(typed_toml.flat(self.config))

    def setting(self, name: str) -> Any:
        return self.settings.get(name)

    def stamp(self) -> tuple[object, ...]:
        """What differs once there is something new to read."""
        states = [(self.folder / file).stat() for file in FILES if (self.folder / file).exists()]
        kept = sorted(path.name for path in (self.folder / "checkpoints").glob("step_*"))
        return folder_lock.is_held(self.folder), kept, [(s.st_ino, s.st_size, s.st_mtime_ns) for s in states]

    def _text(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8", "replace")

    def _config(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self.config_text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"config.toml could not be read: {error}")
            return {}

    def _object(self, name: str) -> dict[str, Any]:
        text = self._text(name)
        try:
            value = json.loads(text) if text else {}
        except (ValueError, RecursionError) as error:
            value = error
        if not isinstance(value, dict):
            self.notes.append(f"{name} could not be read: {value if isinstance(value, Exception) else 'no object'}")
            return {}
        return value


def named(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs, each under the shortest end of its path that no other has. Raises: ConfigError."""
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise ConfigError(f"{folder}: is given twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [RunRecord(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, resolved, strict=True)]


def class_names(runs: Sequence[RunRecord]) -> list[str]:
    """Every class, trained or measured, in one order for all charts and tables: the first run's expert, then as they
    came."""
    trained = [name for run in runs for name in run.metrics.classes()]
    measured = [name for run in runs for each in run.evaluations for name in each.losses]
    names = list(dict.fromkeys(name for name in (*trained, *measured) if name != ALL))
    return sorted(names, key=lambda name: name != runs[0].best_by)
