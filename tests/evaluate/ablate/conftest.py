"""An ablation's configuration on the small world."""

import json

import pytest

STEPS = 12
TOML = """
[base]
path = {base}
[data]
token_budget = 192
bins_per_step = 2
max_steps = {steps}
[classes.GPT4]
reward = 1.0
[classes.GPT3]
weight = 0.1
[optim]
lr = 1e-2
[train]
dtype = "float32"
device = "cpu"
[ablate]
dir = {folder}
input = [{chats}]
held_out = 0.3
template = "openchat_v3.2"
seeds = [3, 5]
"""


@pytest.fixture(scope="package")
def file(world, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    named = {"base": world.base, "chats": chats, "folder": folder / "ablation"}
    path = folder / "ablation.toml"
    path.write_text(TOML.format(**{name: json.dumps(str(value)) for name, value in named.items()}, steps=STEPS))
    return path
