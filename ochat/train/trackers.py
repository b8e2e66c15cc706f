"""Experiment trackers in addition to metrics.jsonl: TensorBoard and Weights & Biases, imported only if configured."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ochat.config import LogConfig
from ochat.errors import ConfigError
from ochat.run import layout

Write = Callable[[int, dict[str, float]], None]  # (step, name -> value)


class Trackers:
    """The configured trackers; none on ranks other than the first."""

    def __init__(self, config: LogConfig, run_dir: Path, config_toml: str, *, enabled: bool):
        self.writers: list[Write] = []
        self._open = ExitStack()
        if enabled and config.tensorboard:
            self.writers.append(self._tensorboard(run_dir))
        if enabled and config.wandb:
            self.writers.append(self._wandb(config.wandb, run_dir, config_toml))

    def add(self, kind: str, lines: list[dict[str, Any]]) -> None:
        """Write every number of the lines (dicts with a `step`), under names such as held_out/GPT4/loss."""
        for line in lines:
            for write in self.writers:
                write(line["step"], dict(_numbers(kind, {key: value for key, value in line.items() if key != "step"})))

    def close(self) -> None:
        """Flush and close them."""
        self._open.close()

    def _tensorboard(self, run_dir: Path) -> Write:
        module = _imported("torch.utils.tensorboard.writer", "log.tensorboard = true needs the package tensorboard")
        writer = module.SummaryWriter(str(run_dir / layout.TENSORBOARD))
        self._open.callback(writer.close)

        def write(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return write

    def _wandb(self, project: str, run_dir: Path, toml: str) -> Write:
        wandb = _imported("wandb", f"log.wandb = {project!r} needs the package wandb")
        names = {"project": project, "name": run_dir.name, "dir": str(run_dir)}
        run = wandb.init(**names, config={"toml": toml}, resume="allow")
        self._open.callback(run.finish)
        return lambda step, numbers: run.log(numbers, step=step)


def _imported(name: str, need: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"{need} (pip install 'ochat-crlft[log]')") from None


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{prefix}/{key}", item)
    elif isinstance(value, int | float):
        yield prefix, float(value)
