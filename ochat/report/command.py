"""`ochat report RUN [RUN ...]`: one HTML file about a run, or about several beside each other.

ochat report runs/mine                                          writes runs/mine/report.html
ochat report runs/a runs/b --output compared.html
ochat report runs/mine --watch                                  writes it again while the run goes on
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from ochat import disk, json_file
from ochat.errors import ConfigError, DataError
from ochat.report import page, run_record, watch
from ochat.report.ablation import Ablation
from ochat.report.page import Contents

NAME = "report.html"
ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class ReportOptions:
    """Shows runs as one HTML file: curves, checkpoints, speed, samples, configuration."""

    # run folders; several are laid over each other
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    output: Path | None = None  # the HTML file; left out: report.html in the run's folder; needed for several runs
    swap: tuple[Path, ...] = ()  # numbers that `ochat eval --output` wrote; RUN/swap.json is shown anyway
    ablation: Path | None = None  # a folder of `ochat ablate`, whose table is shown too
    watch: bool = False  # write the page again when a run's files change, until the runs end; the page loads itself


def main(options: ReportOptions) -> None:
    """The command `ochat report`."""
    page.plotly_js()  # missing: before anything is read
    runs = run_record.named(options.run)
    output = _output(options)
    console = Console(highlight=False)

    def write(is_live: bool = False) -> None:
        swaps = {str(path): _object(path) for path in options.swap}
        contents = Contents(runs, swaps, Ablation.read(options.ablation) if options.ablation else None)
        disk.write_text(output, page.render(contents, watch.EVERY_S if is_live else None))

    if options.watch:
        console.print(f"writing {escape(str(output))} for as long as a run is live; Ctrl-C ends this", soft_wrap=True)
        watch.follow(runs, write)
    else:
        watch.refresh(runs)
        write()
    console.print(f"wrote {escape(str(output))}, {output.stat().st_size / 1e6:.1f} MB", soft_wrap=True)


def _output(options: ReportOptions) -> Path:
    folders = list(options.run)
    if not folders:
        raise ConfigError("ochat report RUN [RUN ...]: name at least one run folder")
    if options.output is None and len(folders) > 1:
        raise ConfigError("several runs need --output FILE.html")
    output = options.output or folders[0] / NAME
    if output.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--output {output}: expected a name that ends in .html")
    disk.check_places(output)
    return output


def _object(path: Path) -> dict:
    return json_file.read_object(path, DataError, "write it again with `ochat eval --output`")
