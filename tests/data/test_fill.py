"""Laws of the compiled loops: a batch and its counts are what their definitions say: pytest tests/data/test_fill.py"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import batch, fill, shards
from ochat.data.batch import pack
from ochat.data.dataset import TokenDataset
from ochat.data.weights import ROLES
from ochat.errors import DataError
from ochat.text import template

TENSORS = ("input_ids", "labels", "loss_weights", "position_ids", "cu_seqlens", "supervised_rows", "supervised_classes")
RULES = {
    "record": {},
    "classes": {"classes": {"a": ClassConfig(weight=0.3), "b": ClassConfig(weight=-2.0), "c": ClassConfig(weight=0)}},
    "reward": {"weights": WeightsConfig("reward", beta=0.7)},
    "none": {"weights": WeightsConfig("none")},
    "mean": {"weights": WeightsConfig(per_message_mean=True)},
    "mean of classes": {
        "classes": {n: ClassConfig(reward=0.2) for n in "abc"},
        "weights": WeightsConfig("classes", 0.5, True),
    },
}


def write(folder, vocab_size, seed, num_sequences=60):
    """Sequences of any spans: empty ones, supervised first tokens, weights of either sign, missing ones."""
    rng = np.random.default_rng(seed)
    with shards.ShardWriter(folder, vocab_size) as writer:
        for _ in range(num_sequences):
            columns = shards.Columns()
            ends = np.sort(rng.integers(0, 40, rng.integers(1, 6)))
            ends[-1] += ends[-1] == 0
            columns.input_ids.append(rng.integers(0, vocab_size, ends[-1]).astype(np.uint32))
            columns.span_ends.append(ends.tolist())
            columns.span_roles.append(rng.integers(0, len(ROLES), len(ends)).tolist())
            columns.span_weights.append(rng.choice([math.nan, 0.0, 1.0, 0.1, -0.5], len(ends)).tolist())
            columns.conditions.append(str(rng.choice(["a", "b", "c"])))
            columns.rewards.append(float(rng.normal()))
            columns.lines.append(1)
            columns.files.append("x")
            writer.add(columns)
        manifest = {"template": template.load("openchat_v3.2").to_dict(), "tokenizer": {"fingerprint": ""}}
        manifest["context"] = 4096
        writer.finish(manifest, ROLES)
    return folder


@pytest.fixture(scope="module", params=[1 << 16, 1 << 17], ids=["16 bits", "32 bits"])
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 300)
        return write(tmp_path_factory.mktemp("fill") / "data", request.param, seed=request.param)


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(drawn=st.data())
def test_a_compiled_batch_is_its_definition(folder, rule, drawn):
    data = TokenDataset(folder, **RULES[rule], only_class=drawn.draw(st.sampled_from(["", "b"])))
    chosen = drawn.draw(st.lists(st.integers(0, len(data) - 1), max_size=8))
    total = int(data.lengths[chosen].sum())
    shape = drawn.draw(st.sampled_from([{}, {"pad_to": total + 600}, {"pad_to": total + 1, "num_documents": 64}]))
    found = data.batch(chosen, **shape)
    wanted = pack([data[i] for i in chosen], chosen, data.class_ids[chosen].tolist(), **shape)
    for name in TENSORS:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
        if rule == "reward" and name == "loss_weights":  # two libraries' exp may round differently
            torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
        else:
            assert torch.equal(ours, theirs), name
    assert found.weight_sum == pytest.approx(wanted.weight_sum, rel=1e-6 if rule == "reward" else 1e-12)
    for name in ("max_seqlen", "num_tokens", "num_supervised", "lengths", "sequences"):
        assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("index", [-1, 60])
def test_an_index_outside_is_refused(folder, index):
    with pytest.raises(IndexError, match="of 60"):
        TokenDataset(folder).batch([0, index])


@pytest.mark.parametrize("rule", RULES)
def test_what_is_counted_is_what_examples_hold(folder, rule):
    data = TokenDataset(folder, **RULES[rule])
    assert len(data.manifest["shards"]) > 2
    assert data.supervised.tolist() == [np.count_nonzero(e.loss_weights[1:]) for e in data]


def test_the_constants_are_the_batchs():
    assert (fill.IGNORE_INDEX, fill.PAD_ID) == (batch.IGNORE_INDEX, batch.PAD_ID)


@pytest.mark.parametrize(
    ("column", "place", "value"),
    [
        ("offsets", 0, 1),
        ("offsets", -1, 10**12),
        ("offsets", 3, 10**12),
        ("offsets", 4, 0),
        ("span_offsets", 0, 1),
        ("span_offsets", -1, 10**12),
        ("span_offsets", 2, -5),
        ("span_offsets", 3, 10**12),
        ("span_ends", 0, 10**6),
        ("span_ends", 5, -1),
        ("span_roles", 1, 200),
        ("class_ids", 2, 3),
    ],
)
def test_a_shard_that_a_loop_would_run_out_of_is_refused(tmp_path, monkeypatch, column, place, value):
    write(tmp_path / "data", 1 << 16, seed=3)
    data = TokenDataset(tmp_path / "data")
    (shard,) = data._shards
    columns = {name: array.copy() for name, array in shard.columns.items()}
    columns[column][place] = value
    monkeypatch.setattr("ochat.data.mapped.safe_open", lambda *_, **__: Opened(columns))
    with pytest.raises(DataError, match=r"shard-00000\.safetensors: damaged \(sequence \d+ lies outside"):
        TokenDataset(tmp_path / "data")


@pytest.mark.parametrize(
    ("column", "message"), [("rewards", "rewards has 59 entries, not 60"), ("lines", "lines has 59")]
)
def test_columns_of_different_lengths_are_refused(tmp_path, monkeypatch, column, message):
    write(tmp_path / "data", 1 << 16, seed=3)
    (shard,) = TokenDataset(tmp_path / "data")._shards
    columns = shard.columns | {column: shard[column][:-1].copy()}
    monkeypatch.setattr("ochat.data.mapped.safe_open", lambda *_, **__: Opened(columns))
    with pytest.raises(DataError, match=message):
        TokenDataset(tmp_path / "data")


class Opened:
    """Stands in for a file with these columns, which the sizes in the manifest cannot tell from a whole one."""

    def __init__(self, columns):
        self.columns = columns

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def keys(self):
        return list(self.columns)

    def get_tensor(self, name):
        return torch.from_numpy(self.columns[name])
