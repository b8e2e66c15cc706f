"""Laws of `--shard`, `--merge` and `--check`: n shards merged are one prepare; a changed byte is found."""

import json
import shutil
from collections import Counter

import pytest

from ochat.data import check, merge, prepare, shards
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import PrepareOptions, Shard
from ochat.errors import ConfigError, DataError
from tests.tiny_text import conversations, write_base, write_lines

TEMPLATE = "openchat_v3.2"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make(base, tmp_path):
    """make(name, records, **options) -> the folder of a data set."""

    def prepared(name, records, **options):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        source = write_lines(tmp_path / f"{name}.jsonl", records)
        prepare.prepare([source], base, TEMPLATE, tmp_path / name, progress=False, **options)
        return tmp_path / name

    return prepared


def examples(data):
    return [
        (tuple(e.input_ids), tuple(e.loss_weights), e.condition, data.source_location(i)) for i, e in enumerate(data)
    ]


def chat(text, condition):
    return {"items": [{"role": "assistant", "content": text}], "condition": condition}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_shards_merged_are_one_prepare(base, tmp_path, n, monkeypatch):
    """Every record once, from whatever form of input; and each shard is a data set of its own."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 2_000)
    records = conversations(seed=7, count=101)
    sources = [write_lines(tmp_path / "a.jsonl", records[:60]), tmp_path / "b.json"]
    sources[1].write_text(json.dumps(records[60:]))
    prepare.prepare(sources, base, TEMPLATE, tmp_path / "whole", progress=False)
    parts = [tmp_path / f"part{i}" for i in range(1, n + 1)]
    for i, part in enumerate(parts, start=1):
        prepare.prepare(sources, base, TEMPLATE, part, progress=False, shard=f"{i}/{n}")
    merged = merge.merge(parts, tmp_path / "all")
    whole, data = TokenDataset(tmp_path / "whole"), TokenDataset(tmp_path / "all")
    assert examples(data) == [example for part in parts for example in examples(TokenDataset(part))]
    assert Counter(examples(data)) == Counter(examples(whole)) and len(data) > 90
    assert sorted(whole.class_names) == sorted(data.class_names)
    counts, expected = merged["counts"], whole.manifest["counts"]
    assert counts == expected | {"classes": {name: expected["classes"][name] for name in counts["classes"]}}
    assert max(len(TokenDataset(part)) for part in parts) - min(len(TokenDataset(part)) for part in parts) <= 1 + n // 5
    check.check(tmp_path / "all")


def test_classes_and_files_are_united_by_name(make, tmp_path):
    """The numbers of a class differ between the sets; the names do not."""
    first = make("a", [chat("one", "GPT4"), chat("two", "GPT3")])
    second = make("b", [chat("three", "Math"), chat("four", "GPT3"), chat("five", "GPT4")])
    merge.merge([first, second], tmp_path / "all")
    data = TokenDataset(tmp_path / "all")
    assert [e.condition for e in data] == ["GPT4", "GPT3", "Math", "GPT3", "GPT4"]
    assert data.class_names == ("GPT4", "GPT3", "Math") and data.class_ids.tolist() == [0, 1, 2, 1, 0]
    assert [data.source_location(i).rpartition("/")[2] for i in range(5)] == [
        "a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3",
    ]  # fmt: skip


def test_a_merged_set_merges_again(make, tmp_path):
    sets = [make(name, [chat(name, condition)]) for name, condition in (("a", "x"), ("b", "y"), ("c", "x"))]
    merge.merge(sets[:2], tmp_path / "ab")
    merge.merge([tmp_path / "ab", sets[2]], tmp_path / "abc")
    data = TokenDataset(tmp_path / "abc")
    assert [e.condition for e in data] == ["x", "y", "x"] and data.source_location(2).endswith("c.jsonl:1")
    assert [e.input_ids.tolist() for e in data] == [TokenDataset(path)[0].input_ids.tolist() for path in sets]


def test_a_tree_moves_as_a_whole(make, tmp_path):
    """Sets below and beside the output are named by relative paths, others by absolute ones."""
    below, beside, apart = (
        make("tree/all/part", [chat("a", "x")]),
        make("tree/b", [chat("b", "x")]),
        make("c", [chat("c", "x")]),
    )
    merged = merge.merge([below, beside, apart], tmp_path / "tree" / "all")
    files = [shard["file"].rpartition("/")[0] for shard in merged["shards"]]
    assert files == ["part", "../b", str(tmp_path / "c")]
    expected = examples(TokenDataset(tmp_path / "tree" / "all"))
    shutil.move(tmp_path / "tree", tmp_path / "elsewhere")
    assert examples(TokenDataset(tmp_path / "elsewhere" / "all")) == expected
    shutil.rmtree(tmp_path / "elsewhere" / "b")
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: missing"):
        TokenDataset(tmp_path / "elsewhere" / "all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditions": "ignore"}, "b and .*a cannot be merged: template differs"),
        ({"context": 50}, "b and .*a cannot be merged: template differs .context 50, not 4096.*contexts"),
        ({"held_out": 0.5}, "held_out differs"),
    ],
)
def test_sets_that_differ_are_refused(make, tmp_path, options, message):
    records = conversations(seed=3, count=40)
    first, second = make("a", records), make("b", records, **options)
    with pytest.raises(ConfigError, match=message):
        merge.merge([first, second], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_another_tokenizer_is_refused(make, base, tmp_path):
    first = make("a", [chat("a", "x")])
    other = shutil.copytree(base, tmp_path / "other")
    (other / "added_tokens.json").write_text('{"<new>": 259}')
    prepare.prepare([tmp_path / "a.jsonl"], other, TEMPLATE, tmp_path / "b", progress=False)
    with pytest.raises(ConfigError, match="tokenizer differs .fingerprint.*different bases"):
        merge.merge([first, tmp_path / "b"], tmp_path / "all")


def test_train_and_held_out_do_not_merge(make, tmp_path):
    data = make("a", conversations(seed=3, count=40), held_out=0.5)
    with pytest.raises(ConfigError, match="held_out differs .side 'held-out', not 'train'"):
        merge.merge([data, tmp_path / "a-held-out"], tmp_path / "all")


def test_a_missing_or_repeated_shard_is_named(make, tmp_path):
    records = conversations(seed=3, count=20)
    sets = [make(f"{i}/in", records, shard=f"{i}/3") for i in (1, 2, 3)]
    with pytest.raises(DataError, match=r"shard 2/3 of in\.jsonl is missing"):
        merge.merge([sets[0], sets[2]], tmp_path / "all")
    copied = shutil.copytree(sets[0], tmp_path / "copy")
    with pytest.raises(DataError, match="copy and .*1/in: both are shard 1/3"):
        merge.merge([*sets, copied], tmp_path / "all")
    with pytest.raises(ConfigError, match="given 2 times"):
        merge.merge([*sets, sets[0]], tmp_path / "all")
    merge.merge(sets, tmp_path / "all")


def test_an_empty_shard_is_a_set_that_merges(make, tmp_path):
    """More machines than records: none of them fails."""
    sets = [make(f"{i}/in", [chat("a", "x"), chat("b", "y")], shard=f"{i}/3") for i in (1, 2, 3)]
    merge.merge(sets, tmp_path / "all")
    assert [e.condition for e in TokenDataset(tmp_path / "all")] == ["x", "y"]


def test_an_output_in_the_way_is_kept(make, tmp_path):
    first, second = make("a", [chat("a", "x")]), make("b", [chat("b", "x")])
    for output, message in ((first, "is one of the sets"), (make("c", [chat("c", "x")]), "shards of its own")):
        with pytest.raises(ConfigError, match=message):
            merge.merge([first, second], output, overwrite=True)
    merge.merge([first], tmp_path / "all")
    with pytest.raises(ConfigError, match="--overwrite"):
        merge.merge([first, second], tmp_path / "all")
    merge.merge([first, second], tmp_path / "all", overwrite=True)
    assert len(TokenDataset(tmp_path / "all")) == 2 and len(TokenDataset(first)) == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "/", "1/0"])
def test_an_impossible_shard_is_named(text):
    with pytest.raises(ConfigError, match=f"--shard {text}: i/n is needed"):
        Shard.parse(text)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.safetensors", "rejects.jsonl"])
def test_one_changed_byte_is_found(make, tmp_path, name, is_merged, monkeypatch):
    """In every file, also where nothing but a character of a class's name changes."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 100)
    monkeypatch.setattr(prepare, "BATCH_RECORDS", 2)
    folder = make("a", [*conversations(seed=3, count=20), {"bad": 1}], on_bad="skip")
    if is_merged:
        merge.merge([folder], tmp_path / "all")
    checked = tmp_path / "all" if is_merged else folder
    assert check.check(checked).num_files == len(list(folder.iterdir())) - is_merged  # rejects are not merged
    if is_merged and name == "rejects.jsonl":
        return
    damaged = (checked if name == "manifest.json" else folder) / name
    content = bytearray(damaged.read_bytes())
    content[content.index(b"GPT3") + 3 if b"GPT3" in content else len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: its content has changed"):
        check.check(checked)
    damaged.write_bytes(content[:-2])
    with pytest.raises(DataError, match=name):
        check.check(checked)


def test_the_command_merges_and_checks(make, tmp_path, capsys):
    sets = tuple(str(make(name, [chat(name, "x")])) for name in ("a", "b"))
    prepare.main(PrepareOptions(merge=sets, output=str(tmp_path / "all")))
    prepare.main(PrepareOptions(check=str(tmp_path / "all")))
    text = capsys.readouterr().out
    assert "2 data sets as one, 2 conversations" in text and "3 files" in text and "all as they were written" in text
    with pytest.raises(ConfigError, match="--output"):
        prepare.main(PrepareOptions(merge=sets))
    with pytest.raises(ConfigError, match="--merge and --check: give one of them"):
        prepare.main(PrepareOptions(merge=sets, output="x", check="y"))
    with pytest.raises(ConfigError, match="--base is missing"):
        prepare.main(PrepareOptions(input=("a.jsonl",), output="x"))
