"""Laws of conditions made of rewards: each record's class is its reward's, and who reads the data set knows the names:
pytest tests/data/test_rewards.py"""

import json

import numpy as np
import pytest

from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.errors import ConfigError, DataError
from ochat.text import openchat_json
from ochat.train.identity import served_template
from tests import tiny
from tests.data.conftest import chat
from tests.tiny import write_lines


def records(count=101, seed=0):
    rng = np.random.default_rng(seed)
    return [chat(f"a{i}", condition="", reward=float(reward)) for i, reward in enumerate(rng.normal(size=count))]


def conditions(data):
    return [example.condition for example in data]


def test_bins_and_their_names_are_kept(prepare_into, tmp_path):
    made = records()
    options = {"condition_from": "reward", "bins": (-0.5, 0.5)}
    data = TokenDataset(prepare_into(tmp_path / "data", made, **options).output)
    assert conditions(data) == [f"reward:{(r['reward'] >= -0.5) + (r['reward'] >= 0.5)}" for r in made]
    described = {"field": "reward", "edges": [-0.5, 0.5], "names": ["reward:0", "reward:1", "reward:2"]}
    assert data.manifest["condition_from"] == described and data.levels == described["names"]
    assert served_template(data).default_condition == "reward:2"
    assert data.manifest["prefixes"]["ids"].keys() == {"", *described["names"]}


def test_quantiles_hold_equally_many_also_in_shards(base, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", records(200))
    options = {"progress": False, "workers": 0, "condition_from": "reward", "quantiles": 4}
    data = TokenDataset(prepare([source], base, "openchat_v3.2", tmp_path / "whole", **options).output)
    assert sorted(data.class_counts().values()) == [50] * 4 and data.levels == [f"reward:{i}" for i in range(4)]
    parts = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        prepare([source], base, "openchat_v3.2", part, **options, shard=f"{i}/3")
    assert TokenDataset(parts).class_counts() == data.class_counts()
    held = TokenDataset(prepare([source], base, "openchat_v3.2", tmp_path / "cut", **options | {"quantiles": 2}).output)
    assert held.manifest["condition_from"]["edges"] == data.manifest["condition_from"]["edges"][1:2]
    with pytest.raises(ConfigError, match="condition_from differs"):
        TokenDataset([tmp_path / "whole", tmp_path / "cut"])


def test_rounded_rewards_are_numbers_in_order(prepare_into, tmp_path):
    made = records()
    data = TokenDataset(prepare_into(tmp_path / "data", made, condition_from="reward", round_to=0.5).output)
    values = [float(name.removeprefix("reward:")) for name in conditions(data)]
    assert np.abs(np.array(values) - [r["reward"] for r in made]).max() <= 0.25
    assert data.levels == sorted(set(conditions(data)), key=lambda name: float(name.removeprefix("reward:")))
    assert data.manifest["condition_from"] == {"field": "reward", "step": 0.5}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat(condition=""), r"in.jsonl:2: reward: missing or null, and --condition-from reward needs one in every"),
        (chat(condition="", reward=None), "reward: missing or null"),
        (chat(condition="", reward="good"), "reward: expected a number, got text"),
        (chat(reward=1.0), "condition: --condition-from reward gives the record the class of its reward"),
        (
            {"items": [{"role": "user", "content": "a", "condition": "x"}, *chat()["items"][1:]], "reward": 1},
            r"items\[0\].condition: --condition-from reward gives all turns",
        ),
    ],
)
def test_every_record_has_a_reward_and_no_other_class(prepare_into, tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        prepare_into(tmp_path / "data", [*records(1), record], condition_from="reward", bins=(0.0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": (0.1,)}, "--bins: does nothing without --condition-from reward"),
        ({"condition_from": "reward"}, "one of --bins, --quantiles, --round-to is needed, got none"),
        ({"condition_from": "reward", "bins": (0.1,), "quantiles": 3}, "got --bins and --quantiles"),
        ({"condition_from": "reward", "bins": (0.2, 0.1)}, "--bins 0.2 0.1: rising numbers"),
        ({"condition_from": "reward", "quantiles": 1}, "--quantiles 1: at least 2"),
        ({"condition_from": "reward", "round_to": -1.0}, "--round-to -1.0: a number above 0"),
        ({"condition_from": "reward", "bins": (0.1,), "default_condition": "a"}, "take one of the two out"),
    ],
)
def test_impossible_options_are_named(prepare_into, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        prepare_into(tmp_path / "data", records(2), **options)


def test_quantiles_of_few_values_are_refused(prepare_into, tmp_path):
    made = [chat(condition="", reward=float(i % 3)) for i in range(30)]
    with pytest.raises(DataError, match=r"--quantiles 4: rewards are too often the same, .* take fewer, or --bins"):
        prepare_into(tmp_path / "data", made, condition_from="reward", quantiles=4)
    with pytest.raises(DataError, match="--quantiles 4: no record has a reward"):
        prepare_into(tmp_path / "data", [chat()], condition_from="reward", quantiles=4)


def test_an_export_says_the_names(tmp_path):
    world = tiny.make(tmp_path / "world")
    source = write_lines(tmp_path / "rewards.jsonl", records(40))
    prepare(
        [source], world.base, "openchat_v3.2", tmp_path / "data", progress=False, condition_from="reward", quantiles=2
    )
    tiny.train(world, tmp_path / "run", f"--data.path={tmp_path / 'data'}", '--condition.goals="at_least"')
    described = json.loads((tmp_path / "run" / "export" / "openchat.json").read_text())
    assert (
        described["condition_from"]["names"] == ["reward:0", "reward:1"]
        and len(described["condition_from"]["edges"]) == 1
    )
    assert openchat_json.load_template(tmp_path / "run" / "export", None, None).default_condition == "reward:1"
