"""configs/: every recipe is a configuration, and its table says what the plan predicts today."""

import pytest

from benchmarks import recipes
from ochat import config as configuration
from ochat.plan.gpus import CARDS

README = (recipes.CONFIGS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted(recipes.CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_a_recipe_can_be_read(file):
    assert configuration.load(file).base.path


@pytest.mark.parametrize(
    ("recipe", "card", "gpus", "nodes"),
    [("llama3.2_1b", "A100-80", 1, 1), ("llama3_8b_8gpu", "H100", 8, 1), ("llama3_70b", "H200", 8, 4)],
)
def test_the_table_is_what_the_plan_predicts(recipe, card, gpus, nodes):
    """After a change of the plan: python -m benchmarks.recipes --write"""
    found = recipes.predict(recipe, CARDS[card], gpus, nodes, recipes.workload())
    assert recipes._row(recipe, CARDS[card], gpus, nodes, found) in README.splitlines()
