"""The command line: no value is lost, every user error is one message, help says it all: pytest tests/test_cli.py"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ochat import cli
from ochat import config as configuration
from ochat.commands import doctor
from ochat.config import ClassConfig, Config, EvalConfig, MixConfig, StageConfig
from ochat.errors import ConfigError
from ochat.evaluate.ablate.variants import SET_HERE
from ochat.model.families import FAMILIES
from ochat.text import template as templates

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    model: Path
    many: tuple[str, ...] = ()
    more_words: tuple[str, ...] = ()
    one: int = 0
    flag: bool = False


def parse(arguments):
    return cli.parse(Options, arguments, "test")


words = st.text("ab -=_5é\n", max_size=4).filter(lambda word: not word.lstrip("-")[:1].isalpha() or word[0] != "-")


@settings(deadline=None)  # the first call imports tyro
@given(
    st.data(), st.lists(st.tuples(st.sampled_from(["many", "more-words", "more_words"]), st.lists(words, min_size=1)))
)
def test_every_value_arrives_in_order(data, runs):
    """However values are shared out among repeated flags, wherever other options stand."""
    arguments, wanted = [], {"many": [], "more_words": []}
    others = data.draw(st.permutations([["--one", "7"], ["--flag"]]))
    for flag, values in runs:
        if data.draw(st.booleans()):
            arguments += [f"--{flag}", *values]
        else:
            arguments += [f"--{flag}={value}" for value in values]
        wanted[flag.replace("-", "_")] += values
        if others and data.draw(st.booleans()):
            arguments += others.pop()
    arguments += [word for other in others for word in other]
    wanted_options = Options(Path("M"), tuple(wanted["many"]), tuple(wanted["more_words"]), 7, True)
    assert parse([*arguments, "M"]) == parse(["M", *arguments]) == wanted_options


@pytest.mark.parametrize("line", ["--many a b M --one 3", "--many=a M --many=b", "--flag M --many a b"])
def test_what_is_positional_may_stand_between_options(line):
    options = parse(line.split())
    assert (options.model, options.many) == (Path("M"), ("a", "b"))


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "/some/where"), 1, "PermissionError: /some/where: Permission denied"),
        (OSError(28, "No space left on device"), 1, "OSError: No space left on device"),
        (OSError("/some/where: cannot be written"), 1, "OSError: /some/where: cannot be written"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), 1, "OSError: a -> b: Invalid cross-device link"),
        (ConfigError("run.toml: not readable as TOML"), 1, "ConfigError: run.toml: not readable as TOML"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("name", ["init-base", "plan"])
def test_what_a_user_or_a_disk_does_needs_no_traceback(monkeypatch, capsys, raised, code, said, name):
    module = importlib.import_module(f"ochat.commands.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "main", Mock(side_effect=raised))
    with pytest.raises(SystemExit) as stopped:
        cli.run(name, ["out"])
    assert stopped.value.code == code and capsys.readouterr().err.strip() == said


@pytest.mark.parametrize(
    ("line", "needle"),
    [
        (["genrate", "--prompt", "Hi"], "no command 'genrate'; did you mean generate?"),
        (["agieval", "anything", "--help"], "lm_eval"),
        (["judge", "anything", "--help"], "alpaca_eval"),
        (["generate", "M", "--promt", "Hi"], "did you mean --prompt?"),
        (["generate", "M", "--prompt"], "--prompt needs a value"),
        (["prepare", "--base", "a", "--base=b"], "--base is given twice"),
        (["prepare", "--no-progress", "--no-progress"], "--no-progress is given twice"),
        (["train"], "Missing from ochat train"),
        (["train", "a.toml", "b.toml"], "Unrecognized"),
        (["plan", "a.toml", "--gpus=x"], "--gpus"),
        (["prepare", "--input", os.fsdecode(b"caf\xe9.jsonl")], "'caf\\udce9.jsonl': this argument is no UTF-8 text"),
    ],
)
def test_wrong_usage_names_the_word_and_exits_with_2(monkeypatch, capsys, line, needle):
    monkeypatch.setattr(sys, "argv", ["ochat", *line])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and needle in " ".join(capsys.readouterr().err.split())


def shown(monkeypatch, capsys, *line: str, columns: str = "80") -> str:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["ochat", *line])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_the_list_of_commands_has_a_line_for_each(monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, "--help", columns="40").splitlines()
    assert {f"  {name:<13} {purpose}" for name, purpose in cli.COMMANDS.items()} <= set(lines)


@pytest.mark.parametrize("name", ["plan", "check", "train", "ablate"])
def test_help_has_every_key_with_its_words_default_and_explanation(monkeypatch, capsys, name):
    printed = shown(monkeypatch, capsys, name, "--help-all")
    assert "…" not in printed and max(map(len, printed.splitlines()[6:])) <= 80, "after the description"
    printed = printed.replace("│", " ")
    sections = {field.name: field.type for field in structs.fields(Config) if field.name not in ("classes", "eval")}
    tables = {"classes.NAME": ClassConfig, "data.mix.NAME": MixConfig, "eval.NAME": EvalConfig}
    tables["loss.stage2"] = StageConfig
    hidden = {f"{section}.{key}" for section, keys in SET_HERE.items() for key in keys} if name == "ablate" else set()
    text = " ".join(printed.split())
    for section, kind in (sections | tables).items():
        for key, explanation in configuration.explanations(kind).items():
            known = f"{section}.{key}" not in hidden and (name != "ablate" or section != "data.mix.NAME")
            shown_as = "subsample.NAME" if key == "subsample" else key
            assert known is (f" --{section}.{shown_as} " in text) or key in ("mix", "stage2"), key
            assert not known or explanation in text or key in ("mix", "stage2")
    assert (
        "--train.recompute one of 'auto', 'block', 'elementwise', 'none'" in text and "(default: [0.9, 0.95])" in text
    )
    assert "--optim.lr a number above 0 or 'auto' " in text
    assert re.search(r"─ \[train\] ─+╮ How a step is computed", text)


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("name", ["plan", "check", "train", "ablate"])
def test_help_has_ten_keys_and_the_way_to_all(monkeypatch, capsys, name, columns):
    printed = shown(monkeypatch, capsys, name, "--help", columns=columns)
    hidden = {f"{section}.{key}" for section, keys in SET_HERE.items() for key in keys} if name == "ablate" else set()
    first = [key for key in cli.FIRST_KEYS if key.replace(".NAME", "") not in hidden]
    assert len(cli.FIRST_KEYS) == 10 and re.findall(r"--([a-z]+\.[a-zA-Z_.]+) +\S", printed) == first
    *_, last = printed.splitlines()
    everything = shown(monkeypatch, capsys, name, "--help-all").replace("│", " ")
    count = len(re.findall(r"^ +--[a-z]+\.", everything, re.MULTILINE))
    assert last == f"all {count} keys: ochat {name} --help-all"


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n not in ("train", "plan", "check", "ablate")])
def test_help_says_what_the_command_does_and_each_option(monkeypatch, capsys, name):
    module = importlib.import_module(f"ochat.commands.{name.replace('-', '_')}")
    options = getattr(module, "".join(map(str.title, name.split("-"))) + "Options")
    printed = shown(monkeypatch, capsys, name, "--help")
    assert all(len(line) <= 88 for line in printed.splitlines()) and "{None}" not in printed
    assert printed.splitlines()[2] == (options.__doc__ or "").splitlines()[0]
    for field in (name.rstrip("_") for name in options.__dataclass_fields__):
        flags = f"--{field.replace('_', '-')}", field.upper(), rf"\[{field.upper()}\]"
        assert re.search(rf"^  ({'|'.join(flags)})[ ,]", printed.replace("│", " "), re.MULTILINE), flags


def printed_by(name, *arguments, capsys):
    cli.call(name, arguments)
    return capsys.readouterr().out


def test_doctor_prints_aligned_facts_and_the_extras_of_the_project(capsys):
    *facts, following = printed_by("doctor", capsys=capsys).splitlines()
    (column,) = {re.match(r"\S+( \S+)*  +", fact).end() for fact in facts}
    named = {fact[:column].strip(): fact[column:] for fact in facts}
    assert {"ochat", "python", "nvidia driver", "torch", "cuda", "triton", "nccl", "flash-attn"} <= set(named)
    assert {"disk here", "limit open files", "attention"} <= set(named) and all(named.values())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name: [re.split("[<>=]", each)[0] for each in extras[name]] for name in doctor.EXTRAS}
    assert {name: list(each) for name, each in doctor.EXTRAS.items()} == named
    assert following == "next: ochat check CONFIG.toml"


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("templates", [*templates.names(), *templates.ALIASES, "base"]),
        ("configs", [file.name for file in (ROOT / "configs").glob("*.toml")]),
        ("models", FAMILIES),
    ],
)
def test_ls_names_all_there_is_within_80_columns(monkeypatch, capsys, what, names):
    monkeypatch.setenv("COLUMNS", "80")
    printed = printed_by("ls", what, capsys=capsys)
    assert all(re.search(rf"^(configs/)?{re.escape(name)} ", printed, re.MULTILINE) for name in names)
    assert max(map(len, printed.splitlines()[:-1])) <= 80 and printed.splitlines()[-1].startswith("next: ochat ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_that_help_lists_is_known(name, capsys):
    module = importlib.import_module(f"ochat.commands.{name.replace('-', '_')}")
    kind = getattr(module, "".join(map(str.title, name.split("-"))) + "Options")
    with pytest.raises(SystemExit):
        cli.parse(kind, ["--help"], name)
    flags = set(re.findall(r"(?m)^\W*(--[a-z][a-z-]*)", capsys.readouterr().out)) - {"--help"}
    for flag in flags:
        cli._gather(kind, [f"{flag}=1"])
