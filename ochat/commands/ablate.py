"""`ochat ablate CONFIG.toml --section.key=value ...`: the paper's variants on one data set, with seeds and intervals.

    ochat ablate small.toml --ablate.jobs=2        trains what is missing, then prints the table
    ochat ablate small.toml --table                prints it without training

Killed, it goes on where it was: finished runs stand, a half-done one goes on from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ochat.commands import train as train_command
from ochat.config import ABLATE, Config
from ochat.errors import ConfigError
from ochat.evaluate.ablate import crew, table, variants
from ochat.evaluate.ablate.crew import Task
from ochat.evaluate.ablate.laboratory import Laboratory, last_step
from ochat.evaluate.ablate.variants import SET_HERE, AblateConfig, Run
from ochat.files import atomic
from ochat.run.lock import FolderLock

TABLE = "--table"
PURPOSE = f"""Trains the paper's variants on one data set, each with several seeds and the same number of full steps,
measures every run on held-out conversations, and prints a table with intervals. CONFIG.toml is a training configuration
with one section more, \\[{ABLATE}].

  {TABLE}   prints the table of the runs that are done, and trains nothing"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, runs what is missing, prints the table. Exits with 1 where a run failed.

    Raises: OchatError before the first run for what is known by then.
    """
    train_command.explain_if_asked(arguments, "ochat ablate", PURPOSE, more={ABLATE: AblateConfig}, without=SET_HERE)
    base, options = read_arguments([a for a in arguments if a != TABLE])
    laboratory, console = Laboratory(base, options), Console(highlight=False)
    if TABLE in arguments:
        laboratory.check()
        failed = []
    else:
        failed = run(laboratory, console)
    results = laboratory.results()
    if results:
        show(laboratory, results, console)
    for task in failed:
        console.print(f"\n[bold red]{escape(task.name)} failed[/]; the end of {escape(str(task.log))}:", soft_wrap=True)
        console.print(escape(crew.tail(task.log)), soft_wrap=True)
    if failed:
        console.print(f"\n{len(failed)} of {len(laboratory.runs)} runs failed; the same command tries them again")
        sys.exit(1)
    if not results:
        raise ConfigError(f"{laboratory.folder}: no run there is done; leave out {TABLE}, and they are trained")


def read_arguments(arguments: Sequence[str]) -> tuple[Config, AblateConfig]:
    """`CONFIG.toml --section.key=value ...`. Raises: ConfigError for anything else."""
    return variants.read(*train_command.split_arguments(arguments))


def run(laboratory: Laboratory, console: Console) -> list[Task]:
    """Trains and measures every run that is not done; those that failed."""
    laboratory.folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(laboratory.folder, console.print, f"--{ABLATE}.dir"):
        laboratory.open()
        todo = laboratory.todo()
        console.print(
            f"{escape(str(laboratory.folder))}: {len(laboratory.runs)} runs of {laboratory.base.data.max_steps:,} "
            f"steps, {len(todo)} to do, {laboratory.options.jobs} at a time", soft_wrap=True
        )  # fmt: skip
        devices = _devices(laboratory.base)
        tasks = [task(laboratory, each, "cuda" if devices else "cpu") for each in todo]
        return crew.work(tasks, slots(laboratory.options.jobs, devices), console)


def task(laboratory: Laboratory, each: Run, device: str) -> Task:
    """The run's two programs: the trainer, and `ochat eval` on what it made."""
    folder = Path(each.config.run.dir)
    conditions = [laboratory.options.expert, laboratory.options.suboptimal] if each.variant.has_condition else []
    limit = laboratory.options.limit
    measure = [
        *("-m", "ochat", "eval", str(folder), str(laboratory.data(each, is_held_out=True))),
        *(f"--conditions={name}" for name in conditions),
        *(() if limit is None else (f"--limit={limit}",)),
        *(f"--dtype={each.config.train.dtype}", f"--device={device}"),
        f"--output={laboratory.measured(each)}",
    ]
    return Task(
        each.name,
        [("-m", "ochat.train", str(laboratory.config_file(each))), measure],
        laboratory.log_file(each),
        each.config.data.max_steps,
        lambda: last_step(folder).get("step", 0),
        lambda: laboratory.close(each),
    )


def slots(jobs: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """What each process at a time has to itself: a device, in turns; the cores, in equal parts."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // jobs))
    own = {"OMP_NUM_THREADS": threads}
    return [own | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}) for i in range(jobs)]


def show(laboratory: Laboratory, results: Sequence[dict], console: Console) -> None:
    """Prints the table, and writes table.json and table.md."""
    options = laboratory.options
    record = table.summarise(results, options.expert, options.suboptimal)
    atomic.write_json(laboratory.folder / "table.json", record)
    atomic.write_text(laboratory.folder / "table.md", table.markdown(record))
    for shown in table.tables(record):
        console.print(shown)
    console.print(escape(f"wrote {laboratory.folder / 'table.md'} and table.json"), soft_wrap=True)


def _devices(base: Config) -> list[str]:
    """The CUDA devices that may be used, as CUDA_VISIBLE_DEVICES names them; none where runs are on the CPU."""
    if base.train.device == "cpu":
        return []
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(torch.cuda.device_count())])[: torch.cuda.device_count()]
