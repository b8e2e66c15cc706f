"""Terminal output: logged notes and warnings, progress bars, and tables of facts.

    configure_logging()                          # once, by a command
    logging.getLogger(__name__).info("saved")    # a library: info is a note, warning a line that must not be missed
    with bar("conversations", 500) as advance: ...; advance(20)
    with waiting("exporting"): ...

Notes and results go to stdout; bars to stderr, only on a terminal, and they vanish when the work is done.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import progress
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from ochat.errors import DataError, OchatError, message

_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])  # all but tab and line break
stdout = Console(highlight=False)  # one for all, so that printed lines and a live bar do not overwrite each other


class ConsoleHandler(logging.Handler):
    """Prints a record as one line on `console`: notes as they are, warnings and errors marked."""

    console = stdout

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno < logging.WARNING else f"[bold red]{record.levelname}[/] "
        self.console.print(f"{mark}{escape(record.getMessage())}", soft_wrap=True)


def configure_logging(console: Console = stdout) -> None:
    """Print the package's notes and warnings on `console`; on ranks other than the first only errors."""
    logger = logging.getLogger("ochat")
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    handlers = [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)] or [ConsoleHandler()]
    handlers[0].console = console
    logger.addHandler(handlers[0])


def show(renderable: RenderableType) -> None:
    """Print a table or a line of markup where notes are printed, so on the first rank only."""
    if logging.getLogger("ochat").isEnabledFor(logging.INFO):
        stdout.print(renderable, soft_wrap=isinstance(renderable, str))


def facts(title: str, values: dict[str, str]) -> Table:
    """A table of names and texts, a line each."""
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(overflow="fold")  # a long path is shown whole
    for name, value in values.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    return table


@contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], object]]:
    """A progress bar that starts at `done`; call what it yields with the number of items just done."""
    columns = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn()
    with _shown(progress.TextColumn(what, markup=False), *columns) as shown:
        task = shown.add_task(what, total=total, completed=done)
        yield lambda count: shown.advance(task, count)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner and the elapsed time, for work that has no steps to count."""
    columns = progress.TextColumn(what, markup=False), progress.TimeElapsedColumn()
    with _shown(progress.SpinnerColumn(), *columns) as shown:
        shown.add_task(what, total=None)
        yield


def _shown(*columns: progress.ProgressColumn) -> progress.Progress:
    console = Console(stderr=True)
    is_hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return progress.Progress(*columns, console=console, transient=True, disable=is_hidden)


def complain(error: OchatError | OSError) -> None:
    """Print an error on stderr. Every rank prints and names itself: an error may be one rank's alone."""
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"rank {rank}: "
    tell(f"[bold red]{type(error).__name__}[/]: {escape(message(error))}", where)


def tell(text: str, where: str = "") -> None:
    """Print a line of markup on stderr, after `where`; once where several processes of this machine have the same."""
    if _is_first_to_say(text):
        Console(stderr=True, highlight=False).print(f"{where}{text}", soft_wrap=True)


def _is_first_to_say(text: str) -> bool:
    """Whether no other process of this launch on this machine was before: a file's name, in the folder that torchrun
    gives its processes, says so."""
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:  # FOLDER/RANK/error.json
        return True
    mark = Path(file).parents[1] / f"said_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def next_command(*words: object) -> None:
    """Print the command that comes next, exact, to be copied: `words` but for the first, which is taken as it is."""
    first, *rest = map(str, words)
    show(f"[dim]next:[/] {escape(' '.join([first, *map(shlex.quote, rest)]))}")


def stdin_lines() -> Iterator[str]:
    """The lines of stdin with their ends, as they come. Raises: DataError if they are not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"stdin, line {number}: not UTF-8 ({error.reason}); convert it, as with iconv") from None


def printable(text: str) -> str:
    """A model's words without the control characters that would steer a terminal, where stdout is one."""
    return text.translate(_CONTROLS) if stdout.is_terminal else text
