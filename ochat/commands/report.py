"""`ochat report RUN [RUN ...]`: write one HTML file about a run, or about several compared.

ochat report runs/mine                                          writes runs/mine/report.html
ochat report runs/a runs/b --output compared.html
ochat report runs/mine --watch                                  rewrites it while the run is live
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from ochat.console import next_command
from ochat.errors import ConfigError, DataError
from ochat.files import atomic, bounded_json

SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class ReportOptions:
    """Shows runs as one HTML file: curves, checkpoints, speed, samples, configuration."""

    # run folders; several are compared in the same charts
    run: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    output: Path | None = None  # the HTML file (default: report.html in the run's folder); required for several runs
    swap: tuple[Path, ...] = ()  # files that `ochat eval --output` wrote; RUN/swap.json is shown anyway
    ablation: Path | None = None  # a folder of `ochat ablate`, whose table is shown too
    watch: bool = False  # rewrite the page when a run's files change, until no run is live; the page reloads itself


def main(options: ReportOptions) -> None:
    """Write the page. Raises: ConfigError, DataError, OSError."""
    if find_spec("plotly") is None:
        raise ConfigError("ochat report needs the package plotly: pip install 'ochat-crlft[report]'")
    from ochat.report import ablation, page, run_record

    output, console = _output(options), Console(highlight=False, soft_wrap=True, markup=False)
    runs = run_record.named(options.run)

    def write(is_live: bool) -> None:
        advice = "write it again with `ochat eval --output`"
        swaps = {str(path): bounded_json.read_object(path, DataError, advice) for path in options.swap}
        ablated = ablation.read(options.ablation) if options.ablation else None
        atomic.write_text(output, page.render(runs, swaps, ablated, run_record.REFRESH_S if is_live else None))

    if options.watch:
        console.print(f"writing {output} while a run is live; Ctrl-C ends this")
        run_record.follow(runs, write)
    else:
        for run in runs:
            run.refresh()
        write(is_live=False)
    console.print(f"wrote {output}, {output.stat().st_size / 1e6:.1f} MB")
    next_command("ochat chat", options.run[0])


def _output(options: ReportOptions) -> Path:
    folders = list(options.run)
    if not folders:
        raise ConfigError("ochat report RUN [RUN ...]: name at least one run folder")
    if options.output is None and len(folders) > 1:
        raise ConfigError("several runs need --output FILE.html")
    output = options.output or folders[0] / "report.html"
    if output.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--output {output}: expected a name that ends in .html")
    atomic.check_writable(output)
    return output
