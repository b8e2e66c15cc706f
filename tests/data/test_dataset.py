"""Laws of the prepared data set: weights by the configuration, selection, damage: pytest tests/data/test_dataset.py"""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import manifest, store_writer
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError, DataError
from ochat.text import template
from tests.data.conftest import chat
from tests.tiny_text import conversations

TEMPLATE = "openchat_v3.2"
TABLE = {"GPT4": ClassConfig(reward=1.0), "GPT3": ClassConfig(weight=0.25)}


@pytest.fixture(scope="module")
def build(prepare_into):
    """build(folder, records) -> the folder of a data set."""
    return lambda folder, records: Path(prepare_into(folder / "data", records).output)


@pytest.fixture(scope="module")
def mixed(build, tmp_path_factory):
    """300 conversations of two classes in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_TOKENS", 8_000)
        patch.setattr("ochat.data.readers.BATCH_RECORDS", 50)
        return build(tmp_path_factory.mktemp("mixed"), conversations(seed=5, count=300))


@pytest.mark.parametrize(
    "options",
    [{}, {"classes": TABLE}, {"only_class": "GPT3"}, {"subsample": {"GPT4": 0.5}}, {"weights": WeightsConfig("none")}],
    ids=["plain", "table", "one class", "subsample", "no weights"],
)
def test_columns_say_what_examples_say(mixed, options):
    data = TokenDataset(mixed, **options)
    assert len(data) == len(data.lengths) == len(data.supervised) == len(data.class_ids) == len(data.indices)
    for i, example in enumerate(data):
        assert example.input_ids.dtype == np.int64 and example.loss_weights.dtype == np.float32
        assert len(example.input_ids) == len(example.loss_weights) == data.lengths[i]
        assert np.count_nonzero(example.loss_weights[1:]) == data.supervised[i] > 0
        assert data.class_names[data.class_ids[i]] == example.condition
        assert data.source_location(i).endswith(f"in.jsonl:{data.indices[i] + 1}")
    assert data[-1].input_ids.tolist() == data[len(data) - 1].input_ids.tolist()
    with pytest.raises(IndexError):
        data[len(data)]


def test_classes_change_weights_and_nothing_else(mixed):
    """Every supervised token takes its class's weight in place of its own; an own 0 stays 0."""
    plain, weighed = TokenDataset(mixed), TokenDataset(mixed, classes=TABLE)
    for own, by_class in zip(plain, weighed, strict=True):
        assert own.input_ids.tolist() == by_class.input_ids.tolist()
        weight = {"GPT4": 1.0, "GPT3": 0.25}[own.condition]
        assert by_class.loss_weights.tolist() == [weight if w != 0 else 0.0 for w in own.loss_weights.tolist()]
    assert plain.fingerprint == weighed.fingerprint


def test_rewards_are_each_conversations_own_and_one_that_gives_no_weight_is_named(build, tmp_path):
    reward = WeightsConfig("reward", beta=0.5)
    data = TokenDataset(build(tmp_path / "a", [chat(reward=0.4), chat(reward=1.0)]), weights=reward)
    assert [max(e.loss_weights) for e in data] == pytest.approx([math.exp(-1.2), 1.0])
    for record, message in ((chat(), "no reward"), (chat(reward=1e4), "infinite")):
        path = build(tmp_path / message, [chat(reward=0.4), record])
        with pytest.raises(DataError, match=rf"in\.jsonl:2: .*{message}"):
            TokenDataset(path, weights=reward)


def test_selection_keeps_order_and_is_nested(mixed):
    whole = TokenDataset(mixed)
    only = TokenDataset(mixed, only_class="GPT3", classes={"GPT3": ClassConfig(weight=1.0)})
    assert only.indices.tolist() == np.flatnonzero(whole.class_ids == whole.class_names.index("GPT3")).tolist()
    picks = [set(TokenDataset(mixed, subsample={"GPT3": share}, seed=3).indices) for share in (0.2, 0.6, 1.0)]
    assert picks[0] < picks[1] < picks[2] == set(range(300))
    num_gpt3 = len(only)
    assert len(picks[1]) == 300 - num_gpt3 + round(0.6 * num_gpt3)
    again = set(TokenDataset(mixed, subsample={"GPT3": 0.2}, seed=3).indices)
    other = set(TokenDataset(mixed, subsample={"GPT3": 0.2}, seed=4).indices)
    assert again == picks[0] != other


@pytest.mark.parametrize(
    "options, message",
    [
        ({"only_class": "GPT5"}, r"no class 'GPT5' \(its classes: .*'GPT4'"),
        ({"subsample": {"gpt4": 0.5}}, "no class 'gpt4'"),
        ({"only_class": "GPT4", "subsample": {"GPT4": 0.0}}, "leave no conversation"),
        ({"classes": {"GPT4": ClassConfig(weight=1.0)}}, "class 'GPT3'"),
    ],
)
def test_impossible_selections_are_named(mixed, options, message):
    with pytest.raises(ConfigError, match=message):
        TokenDataset(mixed, **options)


def test_template_and_fingerprint(mixed):
    data = TokenDataset(mixed)
    assert data.template == template.load(TEMPLATE)
    prints = {TokenDataset(mixed, **o).fingerprint for o in ({}, {"only_class": "GPT4"}, {"subsample": {"GPT4": 0.5}})}
    assert data.fingerprint in prints and len(prints) == 3


def test_damage_is_refused_with_the_files_name(mixed, tmp_path):
    assert len(manifest.check_files(mixed)) > 3
    folder = shutil.copytree(mixed, tmp_path / "a")
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    for damaged, message in ((content[:-1], r"\d+ bytes instead of"), (b"\xff" * len(content), "damaged")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path.name}: {message}"):
            TokenDataset(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: missing"):
        TokenDataset(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 99}, "version 99"),
        ({"format": "x"}, "not the manifest"),
        ({"roles": ["user"]}, "roles"),
        (b"{", "damaged"),
        (None, "no manifest.json"),
        ("no folder", "no such folder"),
    ],
)
def test_a_folder_that_is_no_data_set_of_this_release_is_refused(mixed, tmp_path, change, message):
    folder = tmp_path / "data"
    if change != "no folder":
        folder.mkdir()
    if isinstance(change, dict):
        manifest.write_manifest(folder / "manifest.json", manifest.read_manifest(mixed) | change)
    elif isinstance(change, bytes):
        (folder / "manifest.json").write_bytes(change)
    with pytest.raises(DataError, match=message):
        TokenDataset(folder)
