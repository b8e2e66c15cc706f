"""Laws of prepared data: weights by the configuration, selection, damage; n shards of an input are one data set."""

import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pytest

from ochat.commands.prepare import PrepareOptions, main
from ochat.config import ClassConfig, WeightsConfig
from ochat.data import manifest, prepare, readers, store_writer
from ochat.data.dataset import TokenDataset
from ochat.errors import ConfigError, DataError
from ochat.text import template
from tests.data.conftest import chat, examples, places
from tests.tiny import mixed_conversations, write_lines

TEMPLATE = "openchat_v3.2"
TABLE = {"GPT4": ClassConfig(reward=1.0), "GPT3": ClassConfig(weight=0.25)}


@pytest.fixture
def make(prepare_into, tmp_path):
    """make(name, records, **options) -> the folder of a data set."""

    def prepared(name, records, **options):
        prepare_into(tmp_path / name, records, f"{name.rpartition('/')[2]}.jsonl", **options)
        return tmp_path / name

    return prepared


@pytest.fixture(scope="module")
def mixed(prepare_into, tmp_path_factory):
    """300 conversations of two classes in several shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_TOKENS", 8_000)
        patch.setattr("ochat.data.readers.BATCH_RECORDS", 50)
        folder = tmp_path_factory.mktemp("mixed") / "data"
        prepare_into(folder, mixed_conversations(seed=5, count=300))
    return folder


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


def test_rewards_are_each_conversations_own_and_one_that_gives_no_weight_is_named(make):
    reward = WeightsConfig("reward", beta=0.5)
    data = TokenDataset(make("in", [chat(reward=0.4), chat(reward=1.0)]), weights=reward)
    assert [max(e.loss_weights) for e in data] == pytest.approx([math.exp(-1.2), 1.0])
    for record, message in ((chat(), "no reward"), (chat(reward=1e4), "infinite"), (chat(reward=40), "1e.30")):
        path = make(message.replace(".", "x"), [chat(reward=0.4), record])
        with pytest.raises(DataError, match=rf"\.jsonl:2: .*{message}"):
            TokenDataset(path, weights=reward)


@pytest.mark.parametrize("table", [{"weight": 1e39}, {"weight": -2e30}, {"reward": 1e4}, {"reward": 70, "beta": 0.9}])
def test_a_class_whose_weight_float32_cannot_sum_is_named(make, table):
    path = make("in", [chat()])
    with pytest.raises(
        ConfigError, match=r"\[classes.GPT4\] gives the weight .*; needed is a finite one up to 1e\+30: "
    ):
        TokenDataset(path, classes={"GPT4": ClassConfig(**table)})
    largest = TokenDataset(path, classes={"GPT4": ClassConfig(weight=1e30)})
    assert np.isfinite(largest[0].loss_weights).all()


def test_a_record_whose_weight_float32_cannot_sum_is_named(make, monkeypatch):
    """By prepare, and in a data set of before by its opening; also where only the product with a mean is too large."""
    message = {"role": "assistant", "content": "yes", "weight": 1e33}
    record = {"items": [{"role": "user", "content": "hi"}, message], "condition": "GPT4"}
    with pytest.raises(DataError, match=r"in.jsonl:2: items\[1\].weight: 1e\+33 is too large"):
        make("in", [chat(), record])
    monkeypatch.setattr("ochat.data.encode.MAX_WEIGHT", 1e38)
    path = make("of before", [chat(), record])
    with pytest.raises(DataError, match=r"of before.jsonl:2: the record gives a token the weight 1e\+33; at most 1e"):
        TokenDataset(path)
    assert len(TokenDataset(path, classes={"GPT4": ClassConfig(weight=1.0)})) == 2


@pytest.mark.parametrize("name", ["all", "a\nb", "\u2066GPT4\u2069"])
def test_a_data_set_of_before_with_a_class_name_that_is_none_is_refused_by_it(make, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr("ochat.data.encode.check_class_name", lambda *_: None)
        path = make("of before", [chat(condition=name)])
    with pytest.raises(DataError, match=r"manifest.json: classes: .*give the class another name"):
        TokenDataset(path)
    names = ("meta-llama/Llama-3", "\u0645\u06cc\u200c\u0634\u0648\u062f", "quality:3,verbosity:1", "All", "\U0001f600")
    assert TokenDataset(make("now", [chat(condition=name) for name in names])).class_names == names


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
    """A selection changes the fingerprint, weights do not."""
    data = TokenDataset(mixed)
    assert data.template == template.load(TEMPLATE)
    assert data.fingerprint == TokenDataset(mixed, classes=TABLE).fingerprint
    prints = {TokenDataset(mixed, **o).fingerprint for o in ({}, {"only_class": "GPT4"}, {"subsample": {"GPT4": 0.5}})}
    assert data.fingerprint in prints and len(prints) == 3


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


# joined sets


def held(data):
    return list(zip(examples(data), places(data), strict=True))


def merge(folders, output):
    """What `ochat prepare --merge` of an earlier release wrote: a manifest that refers to the sets' shards."""
    sets = [manifest.read_manifest(folder) for folder in folders]
    shards = []
    for part, (folder, each) in enumerate(zip(folders, sets, strict=True)):
        shards += [s | {"file": os.path.relpath(folder / s["file"], output), "part": part} for s in each["shards"]]
    record = {key: sets[0][key] for key in ("format", "template", "conditions", "context", "tokenizer", "roles")}
    for key in ("classes", "files"):
        record[key] = list(dict.fromkeys(name for each in sets for name in each[key]))
    record["parts"] = [{key: each[key] for key in ("classes", "files")} for each in sets]
    output.mkdir()
    manifest.write_manifest(output / "manifest.json", record | {"version": 2, "shards": shards})
    return output


@pytest.mark.parametrize("n", [1, 2, 5])
def test_joined_shards_are_one_prepare(base, tmp_path, n, monkeypatch):
    """Every record once, from JSON Lines and JSON; each shard is a data set of its own; what an earlier release merged
    is the same set."""
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 2_000)
    records = mixed_conversations(seed=7, count=101)
    sources = [write_lines(tmp_path / "a.jsonl", records[:60]), tmp_path / "b.json"]
    sources[1].write_text(json.dumps(records[60:]))
    prepare.prepare(sources, base, TEMPLATE, tmp_path / "whole", progress=False, empty_answers="keep")
    parts = [tmp_path / f"part{i}" for i in range(1, n + 1)]
    for i, part in enumerate(parts, start=1):
        prepare.prepare(sources, base, TEMPLATE, part, progress=False, shard=f"{i}/{n}", empty_answers="keep")
    whole, joined = TokenDataset(tmp_path / "whole"), TokenDataset(parts)
    apart = [TokenDataset(part) for part in parts]
    assert held(joined) == [example for data in apart for example in held(data)]
    assert Counter(held(joined)) == Counter(held(whole)) and len(joined) > 90
    assert sorted(whole.class_names) == sorted(joined.class_names)
    assert max(map(len, apart)) - min(map(len, apart)) <= 1 + n // 5
    merged = TokenDataset(merge(parts, tmp_path / "merged"))
    assert held(merged) == held(joined) and merged.fingerprint == joined.fingerprint
    assert merged.lengths.tolist() == joined.lengths.tolist() and merged.class_names == joined.class_names


def test_a_set_that_was_merged_joins_others(make, tmp_path):
    sets = [make(name, [chat(name, condition)]) for name, condition in (("a", "x"), ("b", "y"), ("c", "x"))]
    data = TokenDataset([merge(sets[:2], tmp_path / "ab"), sets[2]])
    assert [e.condition for e in data] == ["x", "y", "x"] and data.source_location(2).endswith("c.jsonl:1")
    assert [e.input_ids.tolist() for e in data] == [TokenDataset(path)[0].input_ids.tolist() for path in sets]
    shutil.rmtree(sets[1])
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: missing"):
        TokenDataset(tmp_path / "ab")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": "ignore"}, "b and .*a cannot be joined: template differs"),
        ({"context": 50}, "b and .*a cannot be joined: template differs .context 50, not 4096.*contexts"),
        ({"held_out": 0.5}, "held_out differs"),
    ],
)
def test_sets_that_differ_are_refused(make, options, message):
    records = mixed_conversations(seed=3, count=40)
    with pytest.raises(ConfigError, match=message):
        TokenDataset([make("a", records), make("b", records, **options)])


def test_another_tokenizer_and_the_held_out_side_are_refused(make, base, tmp_path):
    first = make("a", mixed_conversations(seed=3, count=40), held_out=0.5)
    other = shutil.copytree(base, tmp_path / "other")
    (other / "added_tokens.json").write_text('{"<new>": 259}')
    prepare.prepare([tmp_path / "a.jsonl"], other, TEMPLATE, tmp_path / "b", progress=False, empty_answers="keep")
    with pytest.raises(ConfigError, match="tokenizer differs .fingerprint.*different bases"):
        TokenDataset([first, tmp_path / "b"])
    with pytest.raises(ConfigError, match="held_out differs .side 'held-out', not 'train'"):
        TokenDataset([first, tmp_path / "a-held-out"])


def test_a_missing_or_repeated_shard_is_named(make, tmp_path):
    records = mixed_conversations(seed=3, count=20)
    sets = [make(f"{i}/in", records, shard=f"{i}/3") for i in (1, 2, 3)]
    with pytest.raises(DataError, match=r"shard 2/3 of in\.jsonl is missing"):
        TokenDataset([sets[0], sets[2]])
    copied = shutil.copytree(sets[0], tmp_path / "copy")
    with pytest.raises(DataError, match="copy and .*1/in: both are shard 1/3"):
        TokenDataset([*sets, copied])
    with pytest.raises(ConfigError, match="listed 2 times"):
        TokenDataset([*sets, sets[0]])
    assert len(TokenDataset(sets)) == 20


def test_an_empty_shard_is_a_set_that_joins(make):
    """More machines than records: none of them fails."""
    sets = [make(f"{i}/in", [chat("a", "x"), chat("b", "y")], shard=f"{i}/3") for i in (1, 2, 3)]
    assert [e.condition for e in TokenDataset(sets)] == ["x", "y"]


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.safetensors"])
def test_one_changed_byte_of_a_merged_set_is_found(make, tmp_path, name, monkeypatch):
    """Even if only a character of a class's name changes; of every file of another set: tests/train/test_verify.py."""
    monkeypatch.setattr(store_writer, "SHARD_TOKENS", 100)
    monkeypatch.setattr(readers, "BATCH_RECORDS", 2)
    folder = make("a", [*mixed_conversations(seed=3, count=20), {"bad": 1}], on_bad="skip")
    merged = merge([folder], tmp_path / "all")
    assert len(manifest.check_files(merged)) == len(list(folder.iterdir())) - 2  # without rejects and tokenizer
    damaged = (merged if name == "manifest.json" else folder) / name
    content = bytearray(damaged.read_bytes())
    content[content.index(b"GPT3") + 3 if b"GPT3" in content else len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: its content has changed"):
        manifest.check_files(merged)


def test_the_command_checks_and_says_what_replaces_merge(make, tmp_path, capsys):
    folder = str(make("a", [chat("a", "x")]))
    main(PrepareOptions(check=folder))
    assert "3 files" in (said := capsys.readouterr().out) and "all as they were written" in said
    for options, message in (
        ({"merge": ("a", "b"), "output": "x"}, r'data\.path = \["a", "b"\]'),
        ({"input": ("a",), "check": "y"}, "--input and --check: give one of them"),
        ({"input": ("a.jsonl",), "output": "x"}, "--base is missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(PrepareOptions(**options))
