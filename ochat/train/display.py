"""Show a run: on the terminal its steps, evaluations and answers; and every number in experiment trackers.

A progress bar stays at the bottom of a terminal; each flush of the metrics logs one line, at most one a second.
TensorBoard and Weights & Biases get what metrics.jsonl and eval.jsonl hold; they are imported only if configured.
"""

from __future__ import annotations

import importlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ochat import console
from ochat.checkpoint.measure import SETS
from ochat.config import HELD_OUT, LogConfig
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.run import layout

log = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 240
COLUMNS = 100  # of a step's line


class Display:
    """What is seen of a run of `num_steps` steps; ranks other than the first have no trackers and print nothing.

    `done`: the steps after which it goes on. `with_mfu`: show it of each step, as on a GPU; metrics.jsonl has it.
    """

    def __init__(
        self,
        num_steps: int,
        config: LogConfig,
        run_dir: Path,
        config_toml: str,
        *,
        done: int = 0,
        with_mfu: bool = True,
    ):
        self.with_mfu = with_mfu
        self.num_steps, self._shown, self._printed = num_steps, 0, 0.0
        self._advance: Callable[[int], object] = lambda count: None
        self._trackers: list[Callable[[str, float, int], object]] = []  # each takes (name, value, step)
        self._open = ExitStack()
        tensorboard, wandb = trackers(config)
        if tensorboard:
            # what a killed run showed of later steps comes again
            writer = tensorboard.SummaryWriter(str(run_dir / layout.TENSORBOARD), purge_step=done + 1 if done else 0)
            self._open.callback(writer.close)
            self._trackers.append(writer.add_scalar)
        if wandb:
            names = {"project": config.wandb, "name": run_dir.name, "dir": str(run_dir), "id": _wandb_id(run_dir)}
            run = wandb.init(**names, config={"toml": config_toml}, resume="allow")
            self._open.callback(run.finish)
            self._trackers.append(lambda name, value, step: run.log({name: value}, step=step))

    @contextmanager
    def bar(self, done: int) -> Iterator[None]:
        """A progress bar from step `done`, on a terminal."""
        self._shown = done
        with console.bar("step", self.num_steps, done) as self._advance:
            yield

    def steps(self, lines: list[dict[str, Any]]) -> None:
        """Track the flushed steps, move the bar, and log the newest of them, at most one a second."""
        if not lines:
            return
        newest = lines[-1]["step"]
        self._advance(newest - self._shown)
        self._shown = newest
        if time.monotonic() - self._printed > 1 or newest == self.num_steps:
            self._printed = time.monotonic()
            log.info(_describe(f"step {newest}/{self.num_steps}", lines[-1], with_mfu=self.with_mfu))
        for line in lines:
            self._track("train", line)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Track the numbers of one evaluation, and print them, a table a set and a row a class."""
        sets = ({HELD_OUT: line} if "loss" in line else {}) | line.get(SETS, {})
        for name, row in sets.items():
            title = "held out" if name == HELD_OUT else name
            console.show(_table(f"{title}, after step {line['step']}", row))
            self._track(name if name == HELD_OUT else f"eval/{name}", row | {"step": line["step"]})

    def samples(self, answers: list[dict[str, str]]) -> None:
        """Print the answers to the sample prompts, each cut to one line; samples.jsonl holds all of them."""
        for a in answers:
            text = " / ".join(a["answer"].splitlines())
            shown = text if len(text) <= SAMPLE_CHARACTERS else text[:SAMPLE_CHARACTERS] + " ..."
            console.show(f"[dim]{escape(a['condition'])}[/dim] {escape(a['prompt'])} [dim]->[/dim] {escape(shown)}")

    def close(self) -> None:
        """Flush and close the trackers."""
        self._open.close()

    def _track(self, kind: str, line: dict[str, Any]) -> None:
        """Every number of a line that has a `step`, under names such as held_out/classes/GPT4/loss."""
        for name, value in _numbers(kind, {key: value for key, value in line.items() if key not in ("step", SETS)}):
            for tracker in self._trackers:
                tracker(name, value, line["step"])


def trackers(config: LogConfig) -> tuple[Any, Any]:
    """The modules of TensorBoard and Weights & Biases, None for what is not asked for. Raises: ConfigError where one is
    not installed."""
    name, need = "torch.utils.tensorboard.writer", "log.tensorboard = true needs the package tensorboard"
    return (
        _imported(name, need) if config.tensorboard else None,
        _imported("wandb", f"log.wandb = {config.wandb!r} needs the package wandb") if config.wandb else None,
    )


def _wandb_id(run_dir: Path) -> str:
    """Made at the first start, so that every other one goes on in the same run."""
    path = run_dir / layout.WANDB
    if not path.is_file():
        atomic.write_text(path, uuid.uuid4().hex + "\n")
    return path.read_text(encoding="utf-8").strip()


def _table(title: str, row: dict[str, Any]) -> Table:
    """The numbers of one set: loss and accuracy, or exact matches."""
    keys = ("exact", "prompts") if "exact" in row else ("loss", "accuracy", "tokens")
    table = Table(title=escape(title), title_justify="left")
    for heading in ("class", *keys):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    if "exact" in row:
        whole = [("all", row)] if len(row["classes"]) > 1 else []
    else:
        whole = [("all, weighted", row | {"tokens": row["supervised_tokens"]})]
    for name, each in [*row["classes"].items(), *whole]:
        table.add_row(escape(name), *map(_number, (each[key] for key in keys)))
    return table


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


def _describe(head: str, line: dict[str, Any], *, with_mfu: bool) -> str:
    """A step in COLUMNS columns: losses, rate and speed, then of the rest what there is room for."""
    if line.get("skipped"):
        return f"{head}  skipped, its loss or gradient is not finite"
    first, *rest = f"loss {line['loss']:.3f}", f"lr {line['lr']:.1e}", f"{_short(line['tokens_per_s'])} tok/s"
    room = COLUMNS - len("  ".join((head, first, *rest)))
    classes = _classes({name: row["loss"] for name, row in line["classes"].items()}, room)
    parts = [head, first + classes, *rest]
    more = [f"|g| {line['grad_norm']:.2f}"] + [f"mfu {line['mfu']:.0%}"] * with_mfu + [f"acc {line['accuracy']:.2f}"]
    for part in more:
        if len("  ".join((*parts, part))) <= COLUMNS:
            parts.append(part)
    return "  ".join(parts)


def _classes(losses: dict[str, float | None], room: int) -> str:
    """The losses of the classes in brackets, with names cut where they are too long, and of many the first ones."""
    longest = max(map(len, losses), default=0)
    for length in range(longest, 0, -1):
        text = ", ".join(f"{name[:length]} {'-' if loss is None else f'{loss:.2f}'}" for name, loss in losses.items())
        if len(text) <= room - 3:
            return f" ({text})"
    return _classes(dict(list(losses.items())[:-1]), room) if len(losses) > 1 else ""


def _short(count: float) -> str:
    """With three digits, such as 12.3k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.0f}"


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
