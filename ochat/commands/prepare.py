"""`ochat prepare`: conversations in, a data set of token ids out; or, with --check, compare a data set's checksums.

ochat prepare --input chats.jsonl --base models/base --template openchat_3.5 --output data/train --held-out 0.05
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.data import manifest, prepare
from ochat.data.prepare import COUNTED, PrepareReport
from ochat.data.rejected import REJECTS
from ochat.errors import ConfigError


@dataclass(frozen=True)
class PrepareOptions(prepare.PrepareOptions):
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    check: str = ""  # read the data set in this folder and compare its checksums; nothing is prepared
    merge: tuple[str, ...] = ()  # removed: list the data sets where they are used, as data.path = ["a", "b"]


def main(options: PrepareOptions) -> None:
    """Prepares or checks, and prints what was done."""
    if options.merge:
        listed = ", ".join(f'"{folder}"' for folder in options.merge)
        raise ConfigError(
            f"--merge is no longer needed: list the data sets where they are used, data.path = [{listed}]; sets that "
            "were merged before are still read"
        )
    if options.check and options.input:
        raise ConfigError("--input and --check: give one of them")
    if options.check:
        files = manifest.check_files(options.check)
        num_bytes = sum(path.stat().st_size for path in files)
        print(f"{options.check}: {len(files)} files, {num_bytes / 1e6:.1f} MB, all as they were written")
    else:
        print_report(prepare.run(options))


def print_report(report: PrepareReport, console: Console | None = None) -> None:
    """Print a table of classes for each data set, and one line about the whole."""
    console = console or Console()
    for each in filter(None, (report, report.held_out)):
        console.print(_table(each))
    if report.skipped:
        shown = ", ".join(map(escape, report.skipped[:5])) + (", ..." if len(report.skipped) > 5 else "")
        console.print(f"{len(report.skipped)} files with unknown endings were not read: {shown}", soft_wrap=True)
    rejects = f" ({escape(report.output)}/{REJECTS})" if report.rejected else ""
    console.print(f"{report.rejected} bad records rejected{rejects}; {report.elapsed_s:.1f} s", soft_wrap=True)


def _table(report: PrepareReport) -> Table:
    table = Table(
        title=f"{escape(report.output)}: conversations and tokens, context {report.context}",
        caption="dropped: too long, or no answer left within the context; supervised: tokens of non-zero weight",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class", overflow="fold")
    for title in COUNTED.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, counts in sorted(report.classes.items()):
        table.add_row(escape(name) or "(none)", *(f"{counts[column]:,}" for column in COUNTED))
    table.add_section()
    table.add_row("all", *(f"{report.total[column]:,}" for column in COUNTED))
    return table
