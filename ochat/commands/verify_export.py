"""`ochat verify-export MODEL --server URL`: does my server see what I trained?

ochat verify-export models/mine --server http://127.0.0.1:8000 --data data/held-out
ochat verify-export models/mine --engine vllm --python ~/vllm/bin/python
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.table import Table

from ochat.console import next_command, stdout, waiting
from ochat.errors import ConfigError, ServerError
from ochat.overrides import at_least

if TYPE_CHECKING:
    from ochat.evaluate.compare_served import Asked, Compared, Exported
    from ochat.evaluate.server_client import Reply

    Ask = Callable[[Sequence[Asked]], Sequence[Reply]]


@dataclass(frozen=True)
class VerifyExportOptions:
    """Compares a server with training, by class: prompt ids, answers, log-probabilities."""

    model: Path  # the folder of an export
    server: str = ""  # of a running server: its address, such as http://127.0.0.1:8000
    engine: Literal["vllm", "transformers", "llama.cpp"] | None = None  # what to start for it instead of --server
    python: str = ""  # of --engine: the interpreter of the environment that has it; empty: this one
    gguf: Path | None = None  # of --engine llama.cpp: the file that `ochat export --gguf` wrote
    # prepared data, or conversations, whose questions are asked; left out: eight of our own
    data: tuple[Path, ...] = ()
    count: int = 8  # questions, each under every class
    device: str = "auto"  # of our own model; auto: a GPU if there is one; or cpu, cuda, cuda:1, ...


def main(options: VerifyExportOptions) -> None:
    """Print the table; raise ServerError with the first difference if there is one."""
    from ochat.evaluate.compare_served import Exported  # torch takes seconds to import

    if bool(options.server) == bool(options.engine):
        raise ConfigError("give --server URL of a running server, or --engine vllm, transformers or llama.cpp")
    if options.engine == "llama.cpp" and (options.gguf is None or not options.gguf.is_file()):
        raise ConfigError("--engine llama.cpp needs the file of `ochat export RUN OUT --gguf FILE`: give --gguf FILE")
    at_least(options, count=1)
    from ochat.model.device import find_device

    exported = Exported.open(options.model, find_device(options.device))
    what, compared = verify(options, exported)
    stdout.print(table(f"{options.model} in {what}", compared))
    if compared.difference:
        raise ServerError(compared.difference)
    next_command("ochat serve", options.model)


def verify(options: VerifyExportOptions, exported: Exported) -> tuple[str, Compared]:
    """(what was compared, in words; the comparison)."""
    from ochat.evaluate import chats, compare_served
    from ochat.text.openchat_json import read_description

    found = compare_served.own_chats()
    if options.data:
        found = chats.read_chats(options.data, exported.template, exported.tokenizer, 10 * options.count)
    asked = compare_served.questions(exported, found, options.count)
    classes = () if exported.template.condition_roles == "none" else read_description(options.model).get("classes", ())
    with _asking(options) as (ask, what), waiting("asking"):
        compared = compare_served.compare(exported, asked, (None, *classes), ask)
        return what(), compared


@contextmanager
def _asking(options: VerifyExportOptions) -> Iterator[tuple[Ask, Callable[[], str]]]:
    """What answers, and then its name and version."""
    import torch

    from ochat.evaluate import engines
    from ochat.evaluate.compare_served import MOST
    from ochat.evaluate.server_client import TOP, Server

    versions, python = [], options.python or sys.executable

    def by_server(url: str) -> Ask:
        server = Server(url, options.model.resolve().name)
        versions.append(f"{server.kind or 'a server'} {server.version}".strip())
        return lambda asked: [server.ask(chat, condition, MOST) for chat, condition in asked]

    def by_transformers(asked: Sequence[Asked]) -> Sequence[Reply]:
        replies, version = engines.ask_transformers(options.model, python, asked, MOST, TOP)
        versions.append(f"transformers {version}")
        return replies

    if options.server:
        yield by_server(options.server), lambda: versions[0]
    elif options.engine == "transformers":
        yield by_transformers, lambda: versions[0]
    elif options.engine == "vllm":
        with engines.vllm(options.model, python, on_cpu=not torch.cuda.is_available()) as url:
            yield by_server(url), lambda: versions[0]
    else:
        assert options.gguf is not None
        with engines.llama_cpp(options.gguf, python) as url:  # its own version is of no release
            version = engines.version("xllamacpp", python)
            yield by_server(url), lambda: f"llama.cpp, xllamacpp {version}"


def table(title: str, compared: Compared) -> Table:
    """A row for each class."""
    caption = "the answers' tokens and the likeliest others: max |dlogprob|. -: the server does not tell"
    if any(row.ties for row in compared.rows):
        caption += ". ties: answers that part where two tokens are equally likely but for rounding"
    if any(row.merged for row in compared.rows):
        caption += ". merged: other ids than training's, as the export has no boundary between prefix and message"
    shown = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    shown.add_column("class")
    for name in ("prompts", "ids equal", "greedy equal", "max |dlogprob|"):
        shown.add_column(name, justify="right")
    for row in compared.rows:
        ids = "-" if row.ids_equal is None else f"{row.ids_equal}"
        ids += f" ({row.merged} merged)" if row.merged else ""
        greedy = f"{row.greedy_equal}" + (f" ({row.ties} ties)" if row.ties else "")
        difference = "-" if row.logprob_difference is None else f"{row.logprob_difference:.1e}"
        name = "(default)" if row.condition is None else row.condition or "(none)"
        shown.add_row(escape(name), f"{row.count}", ids, greedy, difference)
    return shown
