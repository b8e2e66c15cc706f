"""Read a run folder for its report: every file may be missing, half-written or damaged.

run = RunRecord(Path("runs/a"), "a");  run.refresh();  run.state;  run.metrics["loss"]
follow([run], lambda is_live: write(...))       # again after every change, until no run is live
"""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat import config as configuration
from ochat.checkpoint.best import Evaluation, best_evaluation, decisive_measure, no_better, read_evaluations
from ochat.config import HELD_OUT
from ochat.errors import ConfigError
from ochat.files import jsonl
from ochat.files.jsonl import finite_number
from ochat.run import layout, lock

FILES = (layout.CONFIG, layout.PLAN, *layout.LINES, layout.EARLIER_NONFINITE, layout.SWAP)
MAX_BYTES = 1 << 24  # of the files that are read whole
REFRESH_S = 5.0  # between two looks at the folders, and between two reloads of the page


class Metrics:
    """Columns of metrics.jsonl by name; a class's are "classes.NAME.KEY"."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        content = path.read_bytes() if path.exists() else b""
        texts = [text for text in content.split(b"\n")[:-1] if text.strip()]  # after the last line end: half a line
        lines = [line for text in texts if (line := jsonl.parse_line(text))]
        self.num_unreadable = len(texts) - len(lines)
        self._rows = [_numbers(line) for line in lines]
        self._columns: dict[str, NDArray[np.float64]] = {}
        self.classes = list(dict.fromkeys(name for line in lines for name in _classes(line)))  # as they first occur

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """(n,); NaN where a line has no such number."""
        if name not in self._columns:
            self._columns[name] = np.array([row.get(name, math.nan) for row in self._rows])
        return self._columns[name]


def _classes(line: dict[str, Any]) -> dict[str, dict[str, Any]]:
    classes = line.get("classes")
    return {name: row for name, row in classes.items() if isinstance(row, dict)} if isinstance(classes, dict) else {}


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    rows = {"": line} | {f"classes.{name}.": row for name, row in _classes(line).items()}
    numbers = {prefix + key: finite_number(value) for prefix, row in rows.items() for key, value in row.items()}
    return {name: number for name, number in numbers.items() if number is not None}


class RunRecord:
    """One run; empty until `refresh`."""

    def __init__(self, folder: Path, name: str) -> None:
        """Raises: ConfigError for a folder that holds no run."""
        if not any((folder / file).is_file() for file in (layout.CONFIG, layout.METRICS)):
            raise ConfigError(f"{folder}: no run is there; name a run folder, with config.toml and metrics.jsonl")
        self.folder, self.name = folder, name
        self.notes: list[str] = []  # what could not be read

    def refresh(self) -> None:
        """Read every file anew. Raises: OSError."""
        self.notes = []
        self.is_live = lock.is_held(self.folder)
        self.metrics = Metrics(self.folder / layout.METRICS)
        self.config_text = self._text(layout.CONFIG)
        config = configuration.with_new_names(self._parsed(layout.CONFIG, tomllib.loads))
        self.settings: dict[str, Any] = dict(configuration.flatten(config))  # by dotted name
        self.plan, self.swap = (self._parsed(name, json.loads) for name in (layout.PLAN, layout.SWAP))
        self.evaluations: list[Evaluation] = read_evaluations(self.folder)
        self.best_by = decisive_measure(self.folder, self.evaluations)
        self.best = best_evaluation(self.evaluations, self.best_by)
        stop_after = finite_number(self.settings.get("train.stop_after"))
        self.ending = no_better(self.folder, int(stop_after)) if stop_after else ""  # before its last step
        self.samples = jsonl.read_lines(self.folder / layout.SAMPLES)
        names = layout.EARLIER_NONFINITE, layout.NONFINITE
        self.nonfinite_steps = [line for name in names for line in jsonl.read_lines(self.folder / name)]
        if self.metrics.num_unreadable:
            self.notes.append(f"{self.metrics.num_unreadable:,} lines of metrics.jsonl could not be read")

    @property
    def steps(self) -> NDArray[np.float64]:
        """(n,): the step of each line."""
        return self.metrics["step"]

    @property
    def num_done(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def num_planned(self) -> int | None:
        """Steps of the whole run, if plan.json or config.toml says."""
        planned = finite_number(self.plan.get("num_steps")) or finite_number(self.settings.get("data.max_steps"))
        return int(planned) if planned else None

    @property
    def state(self) -> str:
        """running, ended, or stopped."""
        if self.is_live:
            return "running"
        ended = self.num_done >= self.num_planned if self.num_planned else (self.folder / layout.EXPORT).is_dir()
        return "ended" if ended or self.ending else "stopped"

    def epochs_at(self, step: int) -> float | None:
        """Passes over the data after `step` steps; None where the plan does not say."""
        planned = self.plan.get("steps_per_epoch")
        counts = [finite_number(each) or 0.0 for each in planned] if isinstance(planned, list) else []
        if not counts or min(counts) <= 0:
            return None
        ends = np.cumsum([0.0, *counts])
        return float(np.interp(step, ends, np.arange(len(ends))))

    def stamp(self) -> tuple[object, ...]:
        """Changes once there is something new to read."""
        states = [(self.folder / file).stat() for file in FILES if (self.folder / file).exists()]
        kept = [path.name for path in layout.checkpoint_folders(self.folder)]
        return lock.is_held(self.folder), kept, [(s.st_ino, s.st_size, s.st_mtime_ns) for s in states]

    def _text(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(MAX_BYTES).decode("utf-8", "replace")

    def _parsed(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        """The object that a file holds; an empty one, and a note, where it is damaged."""
        text = self._text(name)
        try:
            value = parse(text) if text else {}
            if isinstance(value, dict):
                return value
            raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            self.notes.append(f"{name} could not be read: {error}")
            return {}


def named(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs, each named by the shortest end of its path that no other has. Raises: ConfigError."""
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise ConfigError(f"{folder}: is given twice; name each run once")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return [RunRecord(folder, "/".join(path.parts[-depth:])) for folder, path in zip(folders, resolved, strict=True)]


def class_names(runs: Sequence[RunRecord]) -> list[str]:
    """Every class, trained or measured, in one order for all charts and tables: the first run's expert first."""
    trained = [name for run in runs for name in run.metrics.classes]
    measured = [m.name for run in runs for each in run.evaluations for m in each.numbers if m.of == HELD_OUT]
    names = list(dict.fromkeys(name for name in (*trained, *measured) if name is not None))
    return sorted(names, key=lambda name: name != runs[0].best_by.name)


def follow(runs: Sequence[RunRecord], write: Callable[[bool], None]) -> None:
    """Call `write(is_live)` now and after every change; at the end, or on Ctrl-C, a last time with False."""
    seen: object = None
    with suppress(KeyboardInterrupt):
        while True:
            stamps = [run.stamp() for run in runs]
            if stamps != seen:
                seen = stamps
                for run in runs:
                    run.refresh()
                if not any(run.is_live for run in runs):
                    break
                write(True)
            time.sleep(REFRESH_S)
    write(False)
