"""`ochat ablate CONFIG.toml --section.key=value ...`: the paper's variants on one data set, with seeds and intervals.

    ochat ablate small.toml --ablate.jobs=2        trains what is missing, then prints the table
    ochat ablate small.toml --table                prints it without training

After a stop, the same command resumes: finished runs are kept, others continue from their newest checkpoint.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from ochat.commands import train as train_command
from ochat.config import ABLATE
from ochat.console import configure_logging
from ochat.errors import ConfigError
from ochat.evaluate.ablate import ablation_dir, job_runner, table, variants
from ochat.evaluate.ablate.variants import SET_HERE, AblateConfig

TABLE = "--table"
PURPOSE = f"""Trains the paper's variants on one data set, each with several seeds and the same number of full steps,
measures every run on held-out conversations, and prints a table with intervals. CONFIG.toml is a training configuration
with the additional section \\[{ABLATE}].

  {TABLE}   prints the table of the finished runs, and trains nothing"""


def main(arguments: Sequence[str]) -> None:
    """Parses the command line, runs what is missing, prints the table. Exits with 1 where a run failed.

    Raises: OchatError before the first run for what is known by then.
    """
    train_command.explain_if_asked(arguments, "ochat ablate", PURPOSE, more={ABLATE: AblateConfig}, without=SET_HERE)
    configure_logging()
    base, options = variants.read(*train_command.split_arguments([a for a in arguments if a != TABLE]))
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("ochat ablate needs scipy: pip install 'ochat-crlft[report]'")
    ablation, console = ablation_dir.AblationDir(base, options), Console(highlight=False)
    failed = []
    if TABLE in arguments:
        ablation.check()
    else:
        failed = ablation.run()
    if results := ablation.results():
        record = table.summarise(results, options.expert, options.suboptimal)
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
        raise ConfigError(f"{ablation.folder}: no run there is finished; leave out {TABLE}, and they are trained")
