"""Token weights and rewards reach the tokens that they were computed for, through truncation and classes, and what does
not fit is refused by record: pytest tests/data/test_scores.py"""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from safetensors.numpy import load_file, save_file

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import manifest, shown
from ochat.data.dataset import TokenDataset
from ochat.data.encode import multiplied, num_supervised, trim
from ochat.data.scores import token_file
from ochat.data.scores.record_ids import RecordIndex, record_ids, split_id
from ochat.data.scores.token_file import TokenWeights
from ochat.errors import DataError
from ochat.text.token_weights import Span
from tests.data.conftest import chat, examples
from tests.tiny import mixed_conversations, write_lines

TABLE = {"GPT4": ClassConfig(reward=1.0), "GPT3": ClassConfig(weight=0.25)}
SOURCES = [WeightsConfig(source) for source in ("record", "classes", "none")]


@pytest.fixture
def make(prepare_into, tmp_path):
    """make(name, records, **options) -> the folder of a data set, of records in `in.jsonl`."""

    def prepared(name, records, **options):
        prepare_into(tmp_path / name, records, **options)
        return tmp_path / name

    return prepared


def labels(data):
    """Of each example, the places of its supervised labels."""
    return [np.flatnonzero(each.loss_weights[1:]) + 1 for each in data]


def weigh(folder, path, weights=None, **more):
    """A file of weights for a data set as `ochat score` would write it; drawn at random where none are given. Returns
    the weights of each example."""
    data = TokenDataset(folder)
    counts = data.supervised
    draw = np.random.default_rng(0)
    drawn = draw.choice(np.array([0.0, 0.0, 0.3, 1.0, 2.5, -0.5, 0.1], np.float32), counts.sum())
    drawn *= np.repeat(np.arange(len(counts)) % 7 != 3, counts)  # nothing is left of some conversations
    drawn = drawn if weights is None else np.broadcast_to(np.float32(weights), counts.sum())
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    places = [data.source_location(i).rpartition(":") for i in range(len(data))]
    tensors = {
        "record_ids": token_file.lines(record_ids([(file, int(line)) for file, _, line in places])),
        "offsets": offsets,
        "lengths": data.lengths,
        "checksums": np.array([token_file.checksum(each.input_ids) for each in data], np.int64),
        "weights": drawn,
    }
    token_file.write(path, tensors | more)
    return [drawn[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("context", [None, 60])
def test_the_weights_of_training_are_those_that_were_asked_for_times_the_classs(make, tmp_path, context, workers):
    records = mixed_conversations(seed=4, count=150)
    plain = make("plain", records, context=context)
    asked = weigh(plain, tmp_path / "w.safetensors")
    options = {"context": context, "workers": workers, "token_weights": str(tmp_path / "w.safetensors")}
    folder = make("weighted", records, **options)
    for source in SOURCES:
        ours = TokenDataset(folder, classes=TABLE, weights=source)
        theirs = TokenDataset(plain, classes=TABLE, weights=source)
        places = {ours.source_location(i): i for i in range(len(ours))}
        assert 50 < len(ours) < len(theirs), "some conversations have no weight but 0"
        for i, (before, at) in enumerate(zip(theirs, labels(theirs), strict=True)):
            wanted = before.loss_weights.copy()
            wanted[0] = 0
            wanted[at] *= asked[i]
            end = int(np.flatnonzero(wanted).max(initial=-1)) + 1
            place = places.get(theirs.source_location(i))
            if not end:
                assert place is None
                continue
            after = ours[place]
            assert after.input_ids.tolist() == before.input_ids[:end].tolist()
            np.testing.assert_allclose(after.loss_weights[1:], wanted[1:end], rtol=1e-6)
            assert ours.supervised[place] == np.count_nonzero(wanted)
    found = manifest.read_manifest(folder)
    assert found["version"] == manifest.WEIGHTED_VERSION and found["token_weights"]["file"] == "w.safetensors"
    counts = found["counts"]
    assert (
        counts["kept"] + counts["unsupervised"] == len(theirs) + manifest.read_manifest(plain)["counts"]["unsupervised"]
    )


@pytest.mark.parametrize("context", [None, 60])
def test_weights_of_one_change_no_batch_and_no_option_no_byte(make, tmp_path, context):
    records = mixed_conversations(seed=5, count=80)
    plain = make("plain", records, context=context)
    weigh(plain, tmp_path / "w.safetensors", 1.0)
    folder = make("ones", records, context=context, token_weights=str(tmp_path / "w.safetensors"))
    ours, theirs = TokenDataset(folder, classes=TABLE), TokenDataset(plain, classes=TABLE)
    assert examples(ours) == examples(theirs) and ours.supervised.tolist() == theirs.supervised.tolist()
    mine, others = (load_file(each / "shard-00000.safetensors") for each in (folder, plain))
    assert mine.pop("span_factors").tolist() == [1.0] * len(mine["span_ends"])
    assert mine.keys() == others.keys() and all(mine[key].tobytes() == others[key].tobytes() for key in mine)
    found = manifest.read_manifest(plain)
    assert found["version"] == 1 and "token_weights" not in found


def test_a_mean_by_message_divides_by_its_tokens_those_of_weight_0_too(make, tmp_path):
    plain = make("plain", [chat("yes", condition="GPT3")])
    count = int(TokenDataset(plain).supervised[0])
    assert count == 4, "three letters and the end of turn"
    weigh(plain, tmp_path / "w.safetensors", weights=np.array([0, 2, 0, 3]))
    data = TokenDataset(
        make("weighted", [chat("yes", condition="GPT3")], token_weights=str(tmp_path / "w.safetensors")),
        classes=TABLE, weights=WeightsConfig(per_message_mean=True),
    )  # fmt: skip
    assert data[0].loss_weights[-4:].tolist() == [0, 0.25 * 2 / 4, 0, 0.25 * 3 / 4] and data.supervised[0] == 2


def test_held_out_conversations_measure_every_token(make, tmp_path):
    records = mixed_conversations(seed=6, count=200)
    plain = make("plain", records, held_out=0.3)
    weigh(plain, tmp_path / "w.safetensors", 0.5)
    folder = make("weighted", records, held_out=0.3, token_weights=str(tmp_path / "w.safetensors"))
    one, other = (TokenDataset(each.with_name(f"{each.name}-held-out")) for each in (plain, folder))
    assert examples(one) == examples(other) and len(one) > 20 and other.manifest["version"] == 1
    halves = [(tuple(ids), tuple(w / 2 for w in weights), name) for ids, weights, name in examples(TokenDataset(plain))]
    assert examples(TokenDataset(folder)) == halves


def test_show_says_what_a_token_weighs(make, tmp_path):
    plain = make("plain", [chat("yes")])
    weigh(plain, tmp_path / "w.safetensors", 0.5)
    folder = make("weighted", [chat("yes")], token_weights=str(tmp_path / "w.safetensors"))
    (each,) = shown.conversations(folder, [0])
    assert {span.own_weight for span in each.spans if span.role == "assistant"} == {0.5}


def test_spans_are_cut_where_weights_change():
    spans = [Span(1, "bos", None), Span(2, "user", None), Span(6, "assistant", None), Span(8, "user", 0.5, "GPT4")]
    assert num_supervised(spans) == 6
    found = multiplied(spans, np.array([1, 1, 0, 2, 2, 0], np.float32))
    *before, answer, question = spans
    assert found == [
        *before,
        *(answer._replace(end=end, factor=factor) for end, factor in ((4, 1.0), (5, 0.0), (6, 2.0))),
        *(question._replace(end=end, factor=factor) for end, factor in ((7, 2.0), (8, 0.0))),
    ]
    assert trim(found)[-1].end == 7
    first = Span(3, "assistant", None)  # the first token is no label: it goes with the second
    wanted = [first._replace(end=2, factor=0.0), first._replace(factor=2.0)]
    assert multiplied([first], np.array([0, 2], np.float32)) == wanted
    assert multiplied([Span(1, "assistant", None)], np.zeros(0, np.float32)) == [Span(1, "assistant", None)]


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def changed(name, change):
    return lambda tensors: tensors | {name: change(tensors[name])}


def at(place, value):
    def put(column):
        column = column.copy()
        column[place] = value
        return column

    return put


FAULTS = {
    "NaN": (changed("weights", at(1, math.nan)), r"in\.jsonl:1: token weight nan .* supervised token 1 of \d+"),
    "infinite": (changed("weights", lambda w: w.astype(np.float64) * 1e300), r"in\.jsonl:1: token weight inf"),
    "other ids": (changed("checksums", at(1, 5)), r"in\.jsonl:2: .* other tokens .*same base, template, context"),
    "a record too few": (changed("record_ids", lambda ids: token_file.lines(["in.jsonl:1", "in.jsonl:7"])),
                         r"in\.jsonl:2: no token weights .*leave it out"),
    "twice": (changed("record_ids", lambda ids: token_file.lines(["in.jsonl:1"] * 2)), r"in\.jsonl:1 comes twice"),
    "no id": (changed("record_ids", lambda ids: token_file.lines(["in.jsonl"] * 2)), "FILE:LINE is needed"),
    "another file": (changed("record_ids", lambda ids: token_file.lines(["x.jsonl:1", "x.jsonl:2"])),
                     r"no record of .*in\.jsonl; it has those of x\.jsonl"),
    "scores alone": (without("weights"), "no tensor 'weights'"),
    "no offsets": (without("offsets"), "no tensor 'offsets'"),
    "whole numbers": (changed("weights", lambda w: w.astype(np.int32)), "weights is I32"),
    "a row for each condition": (changed("weights", lambda w: w[None]), r"weights is F32 \(1, "),
    "a weight too few": (changed("weights", lambda w: w[1:]), "offsets do not run from 0 to"),
    "a length too few": (changed("lengths", lambda n: n[1:]), "2 record ids, but columns of other lengths"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_are_refused(make, tmp_path, fault):
    change, message = FAULTS[fault]
    records, path = [chat("yes"), chat("no")], tmp_path / "w.safetensors"
    weigh(make("plain", records), path, 0.5)
    save_file({name: np.ascontiguousarray(each) for name, each in change(load_file(path)).items()}, path)
    with pytest.raises(DataError, match=message):
        make("weighted", records, token_weights=str(path))
    assert not (tmp_path / "weighted").exists()


def test_what_is_no_file_of_weights_is_refused(make, tmp_path):
    (tmp_path / "w.safetensors").write_text("no tensors here")
    for path in (tmp_path / "w.safetensors", tmp_path / "nowhere"):
        with pytest.raises(DataError, match=f"{path.name}.*ochat score"):
            make("weighted", [chat()], token_weights=str(path))


@pytest.mark.parametrize(
    ("options", "records"),
    [
        ({"conditions": "ignore"}, None), ({"context": 40}, None), ({}, [chat("yes"), chat("nay")]),
        ({}, [chat("yes"), chat("no", condition="GPT3")]), ({}, [chat("yes"), chat("no", system="s")]),
    ],
    ids=["another template", "another context", "another answer", "another class", "another prompt"],
)  # fmt: skip
def test_another_tokenisation_is_refused_by_record_or_skipped(make, tmp_path, options, records):
    before, path = [chat("yes"), chat("no " * 20 if "context" in options else "no")], tmp_path / "w.safetensors"
    weigh(make("plain", before), path, 0.5)
    options = options | {"token_weights": str(path)}
    with pytest.raises(DataError, match=r"in\.jsonl:[12]: the token weights .* are of other tokens"):
        make("weighted", records or before, **options)
    make("weighted", [*(records or before)], on_bad="skip", **options) if "conditions" not in options else None
    if "conditions" not in options:
        (line,) = (tmp_path / "weighted" / "rejects.jsonl").read_text().splitlines()
        assert json.loads(line)["line"] == 2 and len(TokenDataset(tmp_path / "weighted")) == 1


def test_several_answers_of_a_record_find_their_own_weights(make, tmp_path):
    """Also where one of them is too long: weights are found by their ids."""
    (tmp_path / "map.toml").write_text('[answers]\nchosen = "GPT4"\nrejected = "GPT3"\n')
    records = [{"prompt": "hi", "chosen": f"{'yes ' * (20 * i)}", "rejected": f"no {i}"} for i in range(1, 3)]
    options = {"map": str(tmp_path / "map.toml"), "over_long": "drop", "context": 110}
    plain = make("plain", records, **options)
    assert [each.condition for each in TokenDataset(plain)] == ["GPT4", "GPT3", "GPT3"]
    asked = weigh(plain, tmp_path / "w.safetensors")
    ids = bytes(load_file(tmp_path / "w.safetensors")["record_ids"]).decode().splitlines()
    assert [each.rpartition(":")[2] for each in ids] == ["1", "1#2", "2"]
    data = TokenDataset(make("weighted", records, token_weights=str(tmp_path / "w.safetensors"), **options))
    for example, weights in zip(data, asked, strict=True):
        assert example.loss_weights[-np.count_nonzero(weights) :].any()
        end = int(np.flatnonzero(weights).max()) + 1
        np.testing.assert_array_equal(example.loss_weights[-end:], weights[:end])


def test_rewards_come_from_a_file_of_their_own(make, tmp_path):
    records = [chat("a", reward=9.0), chat("b"), chat("c", condition="GPT3")]
    given = [{"record_id": f"in.jsonl:{i + 1}", "reward": value} for i, value in enumerate((0.5, 1.0, -2.0))]
    lines = write_lines(tmp_path / "rewards.jsonl", [given[2], given[0], given[1] | {"note": "x"}])
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "rewards.parquet")
    for file in (lines, tmp_path / "rewards.parquet"):
        folder = make(f"by {file.suffix}", records, reward_from=str(file), held_out=0.0)
        data = TokenDataset(folder, weights=WeightsConfig("reward", beta=0.5))
        assert [max(each.loss_weights) for each in data] == pytest.approx(
            [math.exp((r["reward"] - 1) / 0.5) for r in given]
        )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"record_id": "in.jsonl:1", "reward": 1}], r"in\.jsonl:2: reward: .* no reward of this record"),
        ([{"record_id": "in.jsonl:1", "reward": 1}] * 2, "comes twice"),
        ([{"record_id": "in.jsonl:1"}], r"rewards\.jsonl:1: reward: missing"),
        ([{"id": "in.jsonl:1", "reward": 1}], r"rewards\.jsonl:1: record_id: missing"),
        ([{"record_id": "in.jsonl:1", "reward": math.nan}], r"rewards\.jsonl:1: reward: .*finite"),
        ([{"record_id": "in.jsonl:1", "reward": "good"}], r"rewards\.jsonl:1: reward: expected a number"),
        ([{"record_id": "in.jsonl", "reward": 1}], r"rewards\.jsonl:1: record_id: .*FILE:LINE"),
        ([{"record_id": "other.jsonl:1", "reward": 1}], "no record of .*in.jsonl"),
        ([{"record_id": f"in.jsonl:{i}", "reward": 1e300} for i in (1, 2)], r"in\.jsonl:1: reward: .*too large"),
    ],
)
def test_a_reward_that_is_missing_or_none_is_refused(make, tmp_path, lines, message):
    path = write_lines(tmp_path / "rewards.jsonl", lines)
    with pytest.raises(DataError, match=message):
        make("out", [chat("a"), chat("b")], reward_from=str(path))


def test_an_id_names_file_line_and_number():
    assert record_ids([("a", 1), ("a", 2), ("a", 2), ("b", 2)]) == ["a:1", "a:2", "a:2#2", "b:2"]
    assert split_id("c:/x#1.jsonl:7#2") == ("c:/x#1.jsonl", 7, 2)
    for text in ("a", ":1", "a:", "a:x", "a:1#", "a:1#x", "a:-1"):
        with pytest.raises(DataError, match="FILE:LINE"):
            split_id(text)


def test_files_are_found_where_data_has_moved():
    index = RecordIndex(["old/a/x.jsonl:1", "old/b/x.jsonl:1", "old/y.jsonl:3", "old/y.jsonl:3#2"], "w")
    names = ["new/a/x.jsonl", "old/b/x.jsonl", "/elsewhere/y.jsonl"]
    found = index.matches(names)
    assert list(found.values()) == ["old/a/x.jsonl", "old/b/x.jsonl", "old/y.jsonl"]
    assert index.rows("old/y.jsonl", 3) == [2, 3] and index.rows("old/y.jsonl", 4) == []
    for inputs, message in (
        (["x.jsonl"], "may be old/a/x.jsonl or old/b/x.jsonl"),
        (["1/y.jsonl", "2/y.jsonl"], "old/y.jsonl may be 1/y.jsonl or 2/y.jsonl"),
        (["z.jsonl"], "no record of z.jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            index.matches(inputs)


def test_a_pickled_file_of_weights_is_opened_where_it_is_used(make, tmp_path):
    plain = make("plain", [chat("yes")])
    (asked,) = weigh(plain, tmp_path / "w.safetensors", 0.5)
    given = TokenWeights.open(tmp_path / "w.safetensors", [str(tmp_path / "in.jsonl")])
    ids = TokenDataset(plain)[0].input_ids
    for each in (given, pickle.loads(pickle.dumps(given))):
        assert each.of(str(tmp_path / "in.jsonl"), 1, ids, len(asked)).tolist() == asked.tolist()
    assert len(pickle.dumps(given)) < 1000
