"""`ochat prepare`: conversations in, a data set of token ids out; or, with --check, compare a data set's checksums.

ochat prepare --input chats.jsonl --base models/base --template openchat_3.5 --output data/train --held-out 0.05
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.commands import show
from ochat.console import next_command
from ochat.data import manifest, prepare
from ochat.data.prepare import COUNTED, PrepareReport
from ochat.data.rejected import REJECTS
from ochat.errors import ConfigError
from ochat.text.records.keys import may_be_classes

FEW = 0.01  # of the supervised tokens: a class that has less is named
LEGEND = "left out: too long, and no answer within the context. supervised: tokens of non-zero weight"
EXAMPLE_LINES = 24
SHOWN_KEYS, SHOWN_CLASSES = 30, 100


@dataclass(frozen=True)
class PrepareOptions(prepare.PrepareOptions):
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    check: str = ""  # read the data set in this folder and compare its checksums; nothing is prepared
    describe: str = ""  # print the keys of this file's first records, and a first version of the file for --map
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
    if options.describe:
        from ochat.data import describe

        print(describe.describe(options.describe), end="")
        return
    if options.check:
        files = manifest.check_files(options.check)
        num_bytes = sum(path.stat().st_size for path in files)
        print(f"{options.check}: {len(files)} files, {num_bytes / 1e6:.1f} MB, all as they were written")
    else:
        report, console = prepare.run(options), Console(highlight=False)
        print_report(report, console)
        if report.example and report.tokenizer:
            show.show(report.example, report.tokenizer, console, most_lines=EXAMPLE_LINES)
            console.print(f"More of them: ochat show {report.output}", soft_wrap=True)
        next_command("ochat new", "--base", options.base, "--data", report.output)


def print_report(report: PrepareReport, console: Console | None = None) -> None:
    """Print a table of classes for each data set, and one line about the whole."""
    console = console or Console()
    for each in filter(None, (report, report.held_out)):
        console.print(_table(each))
    console.print(LEGEND, style="dim", soft_wrap=True)
    if report.skipped:
        console.print(f"{_files(report.skipped)} not read, as no file of records", soft_wrap=True)
    if report.other_splits:
        what = f"{_files(report.other_splits)} not read, as test or validation data"
        console.print(f"[yellow]{what}; name such a file in --input to train on it[/yellow]", soft_wrap=True)
    for what in report.missing_parts:
        console.print(f"[yellow]{escape(what)}; fetch the others too[/yellow]", soft_wrap=True)
    for fact in report.template_facts:
        console.print(escape(fact), soft_wrap=True)
    if report.ignored:
        console.print(f"ignored, as metadata: {escape(_in_words(report.ignored))}", soft_wrap=True)
    columns = may_be_classes(report.ignored)
    if columns and "" in report.classes:
        console.print(
            f"[yellow]{escape(', '.join(columns))} may say where answers come from. A class from such a column: "
            f'--map FILE with condition = {{from = "{escape(columns[0])}"}}[/yellow]',
            soft_wrap=True,
        )
    for what, count in sorted(report.noted.items()):
        console.print(f"[yellow]conversations with {what}: {count:,}[/yellow]", soft_wrap=True)
    total = report.total["supervised"]
    few = {name: counts["supervised"] for name, counts in report.classes.items() if counts["supervised"] < FEW * total}
    if few:
        shares = [f"{escape(name) or '(none)'} ({few[name] / total:.2%})" for name in sorted(few)]
        what = f"classes with less than {FEW:.0%} of the supervised tokens: {_few_of(shares, SHOWN_KEYS)}"
        console.print(f"[yellow]{what}[/yellow]", soft_wrap=True)
    rejects = f" ({escape(report.output)}/{REJECTS})" if report.rejected else ""
    console.print(f"bad records rejected: {report.rejected:,}{rejects}; {report.elapsed_s:.1f} s", soft_wrap=True)


def _in_words(counts: Mapping[str, int]) -> str:
    """The keys with their counts; of many those that come most often."""
    most = sorted(sorted(counts, key=lambda key: -counts[key])[:SHOWN_KEYS])
    more = f" and more, see {manifest.MANIFEST}" if len(counts) > SHOWN_KEYS else ""
    return ", ".join(f"{key} in {counts[key]:,}" for key in most) + more


def _files(names: Sequence[str]) -> str:
    return f"{len(names)} file{'s' * (len(names) > 1)} ({_few_of(list(map(escape, names)), 5)})"


def _few_of(words: Sequence[str], most: int) -> str:
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def _table(report: PrepareReport) -> Table:
    table = Table(
        title=f"{escape(report.output)}: conversations and tokens, context {report.context}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("class", overflow="fold")
    for title in COUNTED.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, counts in sorted(report.classes.items())[:SHOWN_CLASSES]:
        table.add_row(escape(name) or "(none)", *(f"{counts[column]:,}" for column in COUNTED))
    if len(report.classes) > SHOWN_CLASSES:
        table.add_row(f"... of {len(report.classes):,}", *("" for _ in COUNTED))
    table.add_section()
    table.add_row("all", *(f"{report.total[column]:,}" for column in COUNTED))
    return table
