"""Every recipe is a configuration that README.md names, and bash reads every launch script."""

import subprocess
from pathlib import Path

import pytest

from ochat import config as configuration

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("demo/*.toml")])
SCRIPTS = sorted(ROOT.glob("configs/launch/*.sh"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_can_be_read_and_is_described(file):
    assert configuration.load(file).base.path
    if file.parent.name == "configs":
        assert file.stem in (ROOT / "configs" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_a_launch_script_has_no_syntax_error(script):
    assert not subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr
