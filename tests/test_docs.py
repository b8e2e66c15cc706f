"""The documentation says what the code says, recipes are configurations and launch scripts bash:
pytest tests/test_docs.py"""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import msgspec
import pytest

from ochat import config

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("demo/*.toml")])


def test_the_page_of_config_keys_is_made_from_the_code():
    made = runpy.run_path(str(ROOT / "docs" / "config_page.py"))
    assert made["PAGE"].read_text("utf-8") == made["page"](), "run: PYTHONPATH=. python docs/config_page.py"


def test_every_config_key_that_the_documentation_names_exists():
    known = {section.name: section.type for section in msgspec.structs.fields(config.Config)}
    key = re.compile(rf"(?<![\w./])(?:--)?({'|'.join(known)})\.([a-z_]+)\b(?![./(])")
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "configs" / "README.md"]
    pages = [page for page in pages if page.name != "changelog.md"]
    named = {(page.name, *found) for page in pages for found in key.findall(page.read_text(encoding="utf-8"))}
    named = {(page, section, key) for page, section, key in named if key not in ("py", "md", "json", "jsonl", "toml")}
    assert len(named) > 30
    sections = {name: kind for name, kind in known.items() if isinstance(kind, type)}
    unknown = [each for each in named if each[1] in sections and each[2] not in sections[each[1]].__struct_fields__]
    assert not unknown


def test_every_file_that_the_documentation_names_exists():
    """By folder and name, such as `data/batch.py`; tests without their ending, such as `checkpoint/test_best`."""
    text = "".join(page.read_text("utf-8") for page in (*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"))
    modules = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text))
    tests = {f"tests/{name}.py" for name in re.findall(r"`([a-z_/]+/test_[a-z_]+)`", text)}
    assert len(modules) > 10 and len(tests) > 5
    assert not [name for name in modules | tests if not any((ROOT / top / name).is_file() for top in ("", "ochat"))]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_can_be_read_and_is_described(file):
    assert config.load(file).base.path
    if file.parent.name == "configs":
        assert file.stem in (ROOT / "configs" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("script", sorted(ROOT.glob("configs/launch/*.sh")), ids=lambda file: file.name)
def test_a_launch_script_has_no_syntax_error(script):
    assert not subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr
