"""`ochat ablate CONFIG.toml --section.key=value ...`: the paper's variants on one data set, with seeds and intervals.

    ochat ablate small.toml --ablate.jobs=2        trains what is missing, then prints the table
    ochat ablate small.toml --table                prints it without training

After a stop, the same command resumes: finished runs are kept, others continue from their newest checkpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ochat.console import next_command
from ochat.errors import ConfigError
from ochat.evaluate.ablate import variants
from ochat.evaluate.ablate.variants import SET_HERE, AblationFile

SCHEMA = AblationFile
HIDDEN = SET_HERE  # `ochat ablate` sets these in each of its runs


@dataclass(frozen=True)
class AblateOptions:
    """Trains the paper's variants on one data set, each with several seeds and the same number of full steps.

    Measures every run on held-out conversations and prints a table with intervals.
    """

    config: Path
    """a training configuration in TOML with the additional section [ablate]"""
    table: bool = False
    """print the table of the finished runs, and train nothing"""


def main(options: AblateOptions, overrides: Sequence[str] = ()) -> None:
    """Runs what is missing and prints the table. Exits with 1 where a run failed.

    Raises: OchatError before the first run for what is known by then.
    """
    from ochat.evaluate.ablate import ablation_dir, job_runner, table  # torch takes seconds to import

    base, settings = variants.read_config(options.config, overrides)
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("ochat ablate needs scipy: pip install 'ochat-crlft[report]'")
    ablation, console = ablation_dir.AblationDir(base, settings), Console(highlight=False)
    failed = []
    if options.table:
        ablation.check()
    else:
        failed = ablation.run()
    if results := ablation.results():
        record = table.summarise(results, settings.expert, settings.suboptimal)
        table.write(ablation.folder, record)
        for each in table.tables(record):
            console.print(each)
        console.print(escape(f"wrote {ablation.folder / 'table.md'} and table.json"), soft_wrap=True)
    for job in failed:
        console.print(f"\n[bold red]{escape(job.name)} failed[/]; the end of {escape(str(job.log))}:", soft_wrap=True)
        console.print(escape(job_runner.tail(job.log)), soft_wrap=True)
    if failed:
        console.print(f"\n{len(failed)} of {len(ablation.runs)} runs failed; the same command tries them again")
        sys.exit(1)
    if not results:
        raise ConfigError(f"{ablation.folder}: no run there is finished; leave out --table, and they are trained")
    runs = [run.folder for run in ablation.runs]
    next_command("ochat report", *runs, "--ablation", ablation.folder, "--output", ablation.folder / "report.html")
