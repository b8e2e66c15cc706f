"""`ochat COMMAND ...`: the table of commands, their parser and their exit codes.

`ochat` alone lists the commands, `ochat COMMAND --help` says what each takes, every configuration key included. Command
NAME is ochat/commands/NAME.py, imported only when it is asked for: an options dataclass and `main(options)`; or
`main(options, overrides)` and a SCHEMA, the configuration that `--section.key=value` options change.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import signal
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from ochat import config as configuration
from ochat import overrides
from ochat.config import Section
from ochat.console import complain, configure_logging
from ochat.errors import OchatError, UsageError

COMMANDS = {
    "init-base": "make a base folder: from GGUF, from a Hugging Face folder, or random",
    "prepare": "turn conversations into a data set of token ids and weights",
    "plan": "show what a run will do: steps, packing, learning rate",
    "train": "train on one process (many: torchrun -m ochat.train)",
    "export": "write a checkpoint as a Hugging Face folder",
    "generate": "answer prompts under a condition",
    "eval": "measure held-out answers under every class's prefix",
    "answer": "answer AlpacaEval, MT-bench and Vicuna-bench",
    "report": "show runs as one HTML file",
    "represent": "map conversations of each class as models see them",
    "ablate": "train the paper's variants and compare them",
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
        Console(stderr=True).print("interrupted")
        sys.exit(128 + signal.SIGINT)


def call(name: str, arguments: Sequence[str]) -> None:
    """Parses the arguments of one command and runs it. Raises: OchatError, OSError; SystemExit after --help and for a
    command line that cannot be parsed."""
    if name not in COMMANDS:
        raise UsageError(_unknown(name))
    configure_logging()
    module = importlib.import_module(f"ochat.commands.{name.replace('-', '_')}")
    kind = getattr(module, "".join(map(str.title, name.split("-"))) + "Options")  # init-base: InitBaseOptions
    schema = getattr(module, "SCHEMA", None)
    if schema is None:
        module.main(parse(kind, arguments, f"ochat {name}"))
        return
    own, options = overrides.split(arguments)
    if {"-h", "--help"} & set(own):
        kind = _with_keys(kind, schema)
    hidden = getattr(module, "HIDDEN", {})
    module.main(parse(kind, own, f"ochat {name}", use_underscores=True, hidden=hidden), options)


def parse(
    kind: type,
    arguments: Sequence[str],
    prog: str,
    *,
    use_underscores: bool = False,
    hidden: Mapping[str, Collection[str]] | None = None,
) -> Any:
    """The options dataclass `kind` from a command line; exits after --help and where it cannot be parsed.

    A repeatable option takes `--flag a b`, `--flag a --flag b` and mixes of both. `hidden`: configuration keys, by
    section, that help leaves out. Raises: UsageError where an option that takes one value is given twice.
    """
    import tyro  # here: 0.1 s that `ochat` alone does without

    required = [field for field in dataclasses.fields(kind) if _is_required(field)]
    style = [tyro.conf.UseAppendAction, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName]
    style += [tyro.conf.PositionalRequiredArgs]
    plain = _gather(kind, arguments, len(required))
    with _help_registry(hidden or {}):
        return tyro.cli(kind, prog=prog, args=plain, config=tuple(style), use_underscores=use_underscores)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _gather(kind: type, arguments: Sequence[str], num_positional: int) -> list[str]:
    """The arguments with each value of a repeatable option after a flag of its own, then what is positional.

    Where positional arguments are missing, a repeatable option's last values are they: `--prompt Hi MODEL` works.
    """
    hints = typing.get_type_hints(kind)
    flags = {f"--{name.replace('_', '-')}": typing.get_origin(hint) or hint for name, hint in hints.items()}
    flags |= {f"--no-{flag[2:]}": bool for flag, each in flags.items() if each is bool}
    many: dict[str, list[str]] = {}
    single: list[str] = []
    seen: list[str] = []
    words: list[str] = []
    into = words
    for argument in arguments:
        if not (argument.startswith("-") and argument.lstrip("-")[:1].isalpha()):  # tyro's rule: -5 and - are values
            into.append(argument)
            into = words if into is single else into
            continue
        name, equals, value = argument.partition("=")
        flag = f"--{name[2:].replace('_', '-')}" if name.startswith("--") else name
        if flag not in flags and flag not in ("-h", "--help"):
            near = difflib.get_close_matches(flag, flags, n=1)
            raise UsageError(f"no option {name}{f'; did you mean {near[0]}?' if near else ''}; --help lists all")
        if flags.get(flag) is tuple:
            into = many[flag] = many.pop(flag, [])
            into += [value] if equals else []
            into = words if equals else into
        else:
            seen.append(flag)
            single.append(flag + equals + value)
            into = words if equals or flags.get(flag) is bool else single
    for flag in seen:
        if seen.count(flag) > 1 and flag not in ("-h", "--help"):
            raise UsageError(f"{flag} is given {seen.count(flag)} times, but takes one value; give it once")
    for flag, values in reversed(many.items()):
        if not values:
            raise UsageError(f"{flag} needs a value")
        num_lent = max(min(num_positional - len(words), len(values) - 1), 0)
        words[:0] = values[len(values) - num_lent :]
        del values[len(values) - num_lent :]
    return [*(f"{flag}={value}" for flag, values in many.items() for value in values), *single, *words]


def _with_keys(kind: type, schema: type) -> type:
    """The options dataclass with every configuration key of the command's schema, for its help."""
    import tyro

    keys = typing.Annotated[schema, tyro.conf.arg(name="")]
    field = ("keys", keys, dataclasses.field(default=schema()))
    return dataclasses.make_dataclass(
        kind.__name__, [field], bases=(kind,), namespace={"__doc__": kind.__doc__}, frozen=True
    )


def _help_registry(hidden: Mapping[str, Collection[str]]) -> Any:
    """How help shows a section of the configuration: each key with its values in TOML, explanation and default."""
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()
    hidden_of = {_section_of(field.type): hidden.get(field.name, ()) for field in _fields(configuration.Config)}

    @registry.struct_rule
    def section(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, Section)):
            return None
        explained = configuration.explanations(info.type)
        fields = []
        for field in _fields(info.type):
            nested, is_table = _section_of(field.type), typing.get_origin(field.type) is dict
            name = f"{field.name}.NAME" if is_table else field.name
            if field.name in hidden_of.get(info.type, ()):
                continue
            if nested:
                kind, default = typing.Annotated[nested, tyro.conf.arg(name=name)], nested()
                text = " ".join((nested.__doc__ or "").split())
            else:
                value = "" if is_table or field.default is None else overrides.to_toml(field.default)
                hint = f"(default: {value})" if value else ""
                shown = tyro.conf.arg(name=name, metavar=overrides.metavar(field.type), help_behavior_hint=hint)
                kind, default, text = typing.Annotated[str, shown], value, explained[field.name]
            fields.append(StructFieldSpec(field.name, typing.cast(type, kind), default=default, helptext=text))
        return StructConstructorSpec(instantiate=lambda **_: None, fields=tuple(fields))

    return registry


def _fields(section: type[Section]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(section)


def _section_of(kind: Any) -> type[Section] | None:
    """The section that a key of a section is, or that each table of it is."""
    kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else kind
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _unknown(name: str) -> str:
    if name in REMOVED:
        return REMOVED[name]
    alike = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {alike[0]}?" if alike else ""
    return f"no command {name!r}{hint}\n`ochat` lists the commands: {', '.join(COMMANDS)}"


def _print_usage(console: Console) -> None:
    console.print("usage: ochat COMMAND ...\n")
    for name, purpose in COMMANDS.items():
        console.print(f"  [bold]{name:<10}[/] {escape(purpose)}")
    console.print("\n`ochat COMMAND --help` says what each takes.")


if __name__ == "__main__":
    main()
