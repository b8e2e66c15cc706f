"""`ochat COMMAND ...`: the table of commands, their parser and their exit codes.

`ochat` alone lists the commands, `ochat COMMAND --help` says what each takes, `--help-all` every configuration key too.
Command NAME is ochat/commands/NAME.py, imported only when it is asked for: an options dataclass and `main(options)`; or
`main(options, overrides)` and a SCHEMA, the configuration that `--section.key=value` options change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ochat import __version__, overrides
from ochat import config as configuration
from ochat.config import Section
from ochat.console import complain, configure_logging, tell
from ochat.errors import OchatError, UsageError
from ochat.text.fields import has_surrogate

COMMANDS = {
    "new": "write a config for a base, data and GPUs",
    "doctor": "say what this machine has for training, to be copied",
    "ls": "list templates, configs or models",
    "schema": "print the JSON schema of a config, for editors",
    "init-base": "make a base folder: from GGUF, from a Hugging Face folder, or random",
    "prepare": "turn conversations into a data set of token ids and weights",
    "show": "show conversations of a data set as they are trained",
    "plan": "show what a run will do: steps, packing, learning rate",
    "check": "say what train would refuse, in seconds",
    "train": "train, on one GPU or many",
    "export": "write a checkpoint as a Hugging Face folder",
    "verify-export": "compare a server's ids and answers with training's",
    "generate": "answer prompts under a condition",
    "chat": "talk to a model, and compare its classes",
    "serve": "serve an export with vLLM",
    "eval": "measure held-out answers under every class's prefix",
    "score": "write what a model thinks of every supervised token",
    "answer": "answer AlpacaEval, MT-bench and Vicuna-bench",
    "report": "show runs as one HTML file",
    "represent": "map conversations of each class as models see them",
    "ablate": "train the paper's variants and compare them",
}
HELP_ALL = "--help-all"
FIRST_KEYS = (
    "run.dir", "base.path", "data.path", "data.eval_path", "data.token_budget", "data.bins_per_step", "data.epochs",
    "classes.NAME.reward", "optim.lr", "lora.rank",
)  # fmt: skip
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
        print(f"ochat {__version__}")
    else:
        run(name, rest)


def run(name: str, arguments: Sequence[str]) -> None:
    """Runs one command with its own arguments; prints an error that a user can fix as one message, and exits."""
    try:
        call(name, arguments)
    except BrokenPipeError:  # `ochat ... | head`: the reader is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        sys.exit(1)
    except (OchatError, OSError) as error:
        complain(error)
        sys.exit(error.exit_code if isinstance(error, OchatError) else 1)
    except KeyboardInterrupt:
        tell("interrupted")
        sys.exit(128 + signal.SIGINT)


def call(name: str, arguments: Sequence[str]) -> None:
    """Parses the arguments of one command and runs it. Raises: OchatError, OSError; SystemExit after --help and for a
    command line that cannot be parsed."""
    if name not in COMMANDS:
        raise UsageError(_unknown(name))
    if wrong := [argument for argument in arguments if has_surrogate(argument)]:
        raise UsageError(f"{ascii(wrong[0])}: this argument is no UTF-8 text; rename the file that it names")
    configure_logging()
    module = importlib.import_module(f"ochat.commands.{name.replace('-', '_')}")
    kind = getattr(module, "".join(map(str.title, name.split("-"))) + "Options")  # init-base: InitBaseOptions
    schema = getattr(module, "SCHEMA", None)
    if schema is None:
        arguments = ["--help" if argument == HELP_ALL else argument for argument in arguments]
        module.main(parse(kind, arguments, f"ochat {name}"))
        return
    own, options = overrides.split(arguments)
    if {"-h", "--help", HELP_ALL} & set(own):
        with contextlib.suppress(SystemExit):
            parse(kind, ["--help"], f"ochat {name}")
        _print_keys(name, schema, getattr(module, "HIDDEN", {}), of_all=HELP_ALL in own)
        sys.exit(0)
    module.main(parse(kind, own, f"ochat {name}"), options)


def parse(kind: type, arguments: Sequence[str], prog: str) -> Any:
    """The options dataclass `kind` from a command line; exits after --help and where it cannot be parsed.

    A repeatable option takes `--flag a b`, `--flag a --flag b` and mixes of both. Raises: UsageError where an option
    that takes one value is given twice.
    """
    import tyro  # here: 0.1 s that `ochat` alone does without

    style = (
        tyro.conf.UseAppendAction, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName,
        tyro.conf.PositionalRequiredArgs,
    )  # fmt: skip
    return tyro.cli(kind, prog=prog, args=_gather(kind, arguments), config=style)


def _gather(kind: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with each value of a repeatable option after a flag of its own, then what is positional.

    Where positional arguments are missing, a repeatable option's last values are they: `--prompt Hi MODEL` works.
    """
    hints, missing = typing.get_type_hints(kind), dataclasses.MISSING
    names = {name: name.rstrip("_").replace("_", "-") for name in hints}  # class_ is --class
    flags = {f"--{names[name]}": typing.get_origin(hint) or hint for name, hint in hints.items()}
    flags |= {f"--no-{flag[2:]}": bool for flag, each in flags.items() if each is bool} | {"-h": bool, "--help": bool}
    num_positional = sum(each.default is each.default_factory is missing for each in dataclasses.fields(kind))
    many: dict[str, list[str]] = {}
    seen: set[str] = set()  # of the flags that take one value or none
    single: list[str] = []  # those, and the values that follow
    words: list[str] = []
    into = words
    for argument in arguments:
        if not (argument.startswith("-") and argument.lstrip("-")[:1].isalpha()):  # tyro's rule: -5 and - are values
            into.append(argument)
            into = words if into is single else into
            continue
        name, equals, value = argument.partition("=")
        flag = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
        if flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1)
            raise UsageError(f"no option {name}{f'; did you mean {near[0]}?' if near else ''}; --help lists all")
        if flag in seen:
            raise UsageError(f"{flag} is given twice, but takes one value; give it once")
        if flags[flag] is tuple:
            into = many[flag] = many.pop(flag, [])
            into += [value] if equals else []
        else:
            seen.add(flag)
            single.append(flag + equals + value)
            into = single
        if equals or flags[flag] is bool:
            into = words
    for flag, values in reversed(many.items()):
        if not values:
            raise UsageError(f"{flag} needs a value")
        num_lent = max(min(num_positional - len(words), len(values) - 1), 0)
        words[:0] = values[len(values) - num_lent :]
        del values[len(values) - num_lent :]
    return [*(f"{flag}={value}" for flag, values in many.items() for value in values), *single, *words]


def _print_keys(name: str, schema: type[Section], hidden: Mapping[str, Collection[str]], *, of_all: bool) -> None:
    """The keys of a configuration in the style of the options above them: FIRST_KEYS, or all, section by section."""
    console, sections = Console(highlight=False), list(_keys(schema, "", hidden))
    if of_all:
        for title, about, rows in sections:
            console.print(_panel(f"[{title}]", about, rows))
        return
    rows = [row for _, _, rows in sections for row in rows if row[0] in FIRST_KEYS]
    console.print(
        _panel("keys of the config that most runs set", "each is a key of the file too, as [section] key = value", rows)
    )
    count = sum(len(rows) for _, _, rows in sections)
    console.print(f"all {count} keys: ochat {name} --help-all", soft_wrap=True)


def _keys(
    section: type[Section], prefix: str, hidden: Mapping[str, Collection[str]]
) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """Each section's dotted name, what it is, and its keys: each with what it takes, what it is for and its default as
    TOML. `hidden`: keys, by section, that are left out."""
    explained, rows, inner = configuration.explanations(section), [], {}
    for field in msgspec.structs.fields(section):
        is_table = typing.get_origin(field.type) is dict
        kind = typing.get_args(field.type)[1] if is_table else field.type
        name = f"{prefix}{field.encode_name}{'.NAME' * is_table}"
        if field.name in hidden.get(prefix.rstrip("."), ()):
            continue
        if isinstance(kind, type) and issubclass(kind, Section):
            inner[name] = kind
            continue
        default = "" if is_table or field.default is None else f" (default: {json.dumps(field.default)})"
        rows.append((name, f"{overrides.in_words(kind)}\n{explained[field.encode_name]}{default}"))
    if rows:
        yield prefix.rstrip("."), " ".join((inspect.getdoc(section) or "").split()), rows
    for name, kind in inner.items():
        yield from _keys(kind, f"{name}.", hidden)


def _panel(title: str, about: str, rows: list[tuple[str, str]]) -> Panel:
    """A box as tyro draws it: names on the left, what they are on the right."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name, text in rows:
        table.add_row(f"[bold]--{escape(name)}[/]", escape(text))
    return Panel(Group(escape(about), table), title=escape(title), title_align="left", border_style="dim")


def _unknown(name: str) -> str:
    if name in REMOVED:
        return REMOVED[name]
    alike = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {alike[0]}?" if alike else ""
    return f"no command {name!r}{hint}\n`ochat` lists the commands: {', '.join(COMMANDS)}"


def _print_usage(console: Console) -> None:
    console.print("usage: ochat COMMAND ...\n")
    for name, purpose in COMMANDS.items():
        console.print(f"  [bold]{name:<13}[/] {escape(purpose)}")
    console.print("\n`ochat COMMAND --help` says what each takes; where that is a config, --help-all has every key.")
