"""The rules of the tree that no other check holds: pytest tests/test_architecture.py"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ochat import cli
from ochat.run import layout

ROOT = Path(__file__).parents[1]
MODULES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "ochat").rglob("*.py"))}
MAX_MODULES = 16
MAX_README_LINES, MAX_README_COLUMNS = 120, 110
TAKES_CONFIG = ("commands/", "train/build.py", "train/trainer.py", "train/profile.py", "config.py", "evaluate/ablate/")


def name(path: Path) -> str:
    return path.relative_to(ROOT / "ochat").as_posix()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_does_not_import_torch(command):
    program = f"""
import contextlib, io, sys
from ochat import cli
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    cli.call({command!r}, ["--help"])
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_the_kernels_import_torch_and_triton_only():
    known = {"torch", "triton", "ochat_kernels", "__future__", ""} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels" / "ochat_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in named} <= known, path


def test_no_function_below_build_and_commands_takes_the_whole_config():
    for path, tree in MODULES.items():
        if name(path).startswith(TAKES_CONFIG):
            continue
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            kinds = {ast.unparse(argument.annotation) for argument in arguments if argument.annotation}
            assert not kinds & {"Config", "configuration.Config"}, f"{name(path)}: {function.name}"


def test_only_commands_and_the_console_print():
    for path, tree in MODULES.items():
        if name(path).startswith(("commands/", "cli.py", "console.py")):
            continue
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        printing = [ast.unparse(call) for call in calls if ast.unparse(call) in ("print", "Console", "rich.print")]
        assert not printing, f"{name(path)}: {printing}"


def test_the_files_of_a_run_are_named_in_one_place():
    names = {layout.CONFIG, layout.PLAN, *layout.LINES, layout.EARLIER_NONFINITE, layout.CHECKPOINTS, layout.LOCK}
    for path, tree in MODULES.items():
        if name(path) != "run/layout.py":
            found = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} & names
            assert not found, f"{name(path)}: {found}"


def test_no_folder_has_more_modules_than_a_reader_can_hold():
    folders = {path.parent for path in MODULES}
    for folder in folders:
        modules = [path for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= (len(cli.COMMANDS) if folder.name == "commands" else MAX_MODULES), folder


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES and max(map(len, lines)) <= MAX_README_COLUMNS


def test_no_name_with_an_underscore_is_imported():
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ochat"):
                private = [alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"]
                assert not private, f"{path}: {private}"
