"""`ochat COMMAND ...`: each command is one module that is imported only when it is asked for.

`ochat` alone lists the commands, `ochat COMMAND --help` says what each takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.markup import escape

from ochat.errors import OchatError, message
from ochat.option_values import spread


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
    "plan": Command("ochat.commands.plan", None, "show what a run will do: steps, packing, learning rate"),
    "train": Command("ochat.commands.train", None, "train on one process (many: torchrun -m ochat.train)"),
    "export": Command("ochat.export.hf_folder", "ExportOptions", "write a checkpoint as a Hugging Face folder", True),
    "generate": Command("ochat.commands.generate", "GenerateOptions", "answer prompts under a condition", True),
    "eval": Command("ochat.commands.eval", "EvalOptions", "measure held-out answers under every class's prefix", True),
    "answer": Command("ochat.commands.answer", "AnswerOptions", "answer AlpacaEval, MT-bench and Vicuna-bench", True),
    "report": Command("ochat.commands.report", "ReportOptions", "show runs as one HTML file", True),
    "represent": Command(
        "ochat.commands.represent",
        "RepresentOptions",
        "map conversations of each class as models see them",
        True,
    ),
    "ablate": Command("ochat.commands.ablate", None, "train the paper's variants and compare them"),
}

REMOVED = {  # commands of earlier versions, and what replaces them
    "agieval": "`ochat agieval` is gone: lm-eval scores AGIEval and other multiple choice on an export. "
    "Run `ochat export RUN OUT`, then `lm_eval run --model hf --model_args pretrained=OUT --apply_chat_template "
    "--tasks agieval_en`",
    "judge": "`ochat judge` is gone: alpaca_eval and FastChat judge the files that `ochat answer` writes. Run "
    "`alpaca_eval --model_outputs A.json --reference_outputs B.json`, or `python -m fastchat.llm_judge.gen_judgment`",
}


def main() -> None:
    """The console entry point; exits with 0, 1 (an error that is explained), 2 (wrong usage) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_usage(Console(highlight=False, soft_wrap=True))
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name == "--version":
        from ochat import __version__

        print(f"ochat {__version__}")
    elif name in REMOVED:
        Console(stderr=True, highlight=False, soft_wrap=True).print(escape(REMOVED[name]))
        sys.exit(2)
    elif name not in COMMANDS:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        alike = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {alike[0]}?" if alike else ""
        console.print(f"ochat: no command {escape(repr(name))}{hint}")
        _print_usage(console)
        sys.exit(2)
    else:
        run(name, rest)


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs one command with its own arguments; prints an error that a user can mend as one message, and exits."""
    try:
        _run(name, COMMANDS[name], arguments)
    except OchatError as error:
        _fail(type(error).__name__, str(error), error.exit_code)
    except BrokenPipeError:  # `ochat ... | head`: nobody reads on, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        sys.exit(1)
    except OSError as error:
        _fail(type(error).__name__, message(error), 1)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(128 + signal.SIGINT)


def _run(name: str, command: Command, arguments: Sequence[str]) -> None:
    module = importlib.import_module(command.module)
    if command.options is None:
        module.main(arguments)
        return
    import tyro  # here, because training and planning do without it

    options = getattr(module, command.options)
    required = [field for field in dataclasses.fields(options) if field.default is dataclasses.MISSING]
    style = [tyro.conf.UseAppendAction, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName]
    style += [tyro.conf.PositionalRequiredArgs] if command.positional else []
    plain = spread(options, arguments, len(required) if command.positional else 0)
    module.main(tyro.cli(options, prog=f"ochat {name}", args=plain, config=tuple(style)))


def _fail(kind: str, message: str, exit_code: int) -> NoReturn:
    Console(stderr=True, highlight=False).print(f"[bold red]{kind}[/]: {escape(message)}", soft_wrap=True)
    sys.exit(exit_code)


def _print_usage(console: Console) -> None:
    console.print("usage: ochat COMMAND ...\n")
    for name, command in COMMANDS.items():
        console.print(f"  [bold]{name:<10}[/] {command.purpose}")
    console.print("\n`ochat COMMAND --help` says what each takes.")


if __name__ == "__main__":
    main()
