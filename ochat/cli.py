"""`ochat COMMAND ...`: each command is one module that is imported only when it is asked for.

`ochat` alone lists the commands, `ochat COMMAND --help` says what each takes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from ochat.errors import OchatError


class Command(NamedTuple):
    """Where a command lives: a module with `main(options)`, or `main(arguments)` where there are no options to
    parse."""

    module: str
    options: str | None
    purpose: str
    positional: bool = False  # required options are given by position


COMMANDS = {
    "init-base": Command(
        "ochat.model.init_base",
        "InitBaseOptions",
        "make a base folder: from GGUF, from a Hugging Face folder, or random",
        True,
    ),
    "prepare": Command(
        "ochat.data.prepare", "PrepareOptions", "turn conversations into a data set of token ids and weights"
    ),
    "plan": Command("ochat.train.plan", None, "show what a run will do: steps, packing, learning rate"),
    "train": Command("ochat.train.command", None, "train on one process (many: torchrun -m ochat.train)"),
    "export": Command("ochat.train.export", "ExportOptions", "write a checkpoint as a Hugging Face folder", True),
    "generate": Command("ochat.infer.command", "GenerateOptions", "answer prompts under a condition", True),
}


def main() -> None:
    """The console entry point; exits with 0, 1 (an error that its message explains) or 2 (wrong usage)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage(Console(highlight=False))
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name == "--version":
        from ochat import __version__

        print(f"ochat {__version__}")
    elif name not in COMMANDS:
        console = Console(stderr=True, highlight=False)
        console.print(f"ochat: no command {escape(repr(name))}")
        _print_usage(console)
        sys.exit(2)
    else:
        run(name, rest)


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs one command with its own arguments; prints an OchatError as one message and exits with 1."""
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    if command.options is None:
        module.main(arguments)
        return
    import tyro  # here, because training and planning do without it

    style = (tyro.conf.PositionalRequiredArgs,) if command.positional else ()
    options = tyro.cli(getattr(module, command.options), prog=f"ochat {name}", args=list(arguments), config=style)
    try:
        module.main(options)
    except OchatError as error:
        Console(stderr=True, highlight=False).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True
        )
        sys.exit(1)


def _print_usage(console: Console) -> None:
    console.print("usage: ochat COMMAND ...\n")
    for name, command in COMMANDS.items():
        console.print(f"  [bold]{name:<10}[/] {command.purpose}")
    console.print("\n`ochat COMMAND --help` says what each takes.")
