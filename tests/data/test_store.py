"""Laws of the store: what was written is read, damage is refused, and opening costs a few bytes a sequence.

pytest tests/data/test_store.py
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from ochat.config import ClassConfig, WeightsConfig
from ochat.data import manifest, store, store_writer
from ochat.data.batch import pack
from ochat.data.dataset import TokenDataset
from ochat.data.store_writer import Sequences, StoreWriter, publish
from ochat.data.weights import ASSISTANT, ROLES
from ochat.errors import DataError
from ochat.text import template
from tests import tiny

TENSORS = ["input_ids", "labels", "loss_weights", "position_ids", "cu_seqlens", "supervised_rows", "supervised_classes"]
FACTS = ["max_seqlen", "num_tokens", "num_supervised", "weight_sum", "lengths", "sequences"]
RULES = {
    "record": {},
    "classes": {"classes": {"a": ClassConfig(weight=0.3), "b": ClassConfig(weight=-2.0), "c": ClassConfig(weight=0)}},
    "reward": {"weights": WeightsConfig("reward", beta=0.7)},
    "none": {"weights": WeightsConfig("none")},
    "mean": {"weights": WeightsConfig(per_message_mean=True)},
    "mean of classes": {
        "classes": {name: ClassConfig(reward=0.2) for name in "abc"},
        "weights": WeightsConfig("classes", 0.5, True),
    },
    "mean of conversations": {"weights": WeightsConfig(per_conversation_mean=True)},
    "mean of conversations by reward": {"weights": WeightsConfig("reward", beta=0.7, per_conversation_mean=True)},
}
NUM_SEQUENCES, LENGTH = 400_000, 5_000  # 4 GB of token ids, which lie nowhere: the file is sparse
MIB = 1 << 20

OPEN = """
import sys
from ochat.data.dataset import TokenDataset

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

TokenDataset(sys.argv[1])  # a small one: what code and libraries take is not counted
before = {name: kib(name) for name in ("RssAnon", "VmRSS", "VmHWM")}
data = TokenDataset(sys.argv[2], **eval(sys.argv[3]))
after = {name: kib(name) for name in before}
batch = data.batch([len(data) - 1, 0, 5])
print(after["RssAnon"] - before["RssAnon"], after["VmHWM"] - before["VmRSS"], len(data), batch.num_tokens)
"""
MANIFEST = {"template": template.load("openchat_v3.2").to_dict(), "tokenizer": {"fingerprint": ""}, "context": 4096}


def draw_sequences(vocab_size, seed, count=60):
    """Sequences of any spans: empty ones, supervised first tokens, weights of either sign, missing ones."""
    rng = np.random.default_rng(seed)
    sequences = Sequences()
    for _ in range(count):
        ends = np.sort(rng.integers(0, 40, rng.integers(1, 6)))
        ends[-1] += ends[-1] == 0
        sequences.input_ids.append(rng.integers(0, vocab_size, ends[-1]).astype(np.uint32))
        sequences.span_ends.append(ends.tolist())
        sequences.span_roles.append(rng.integers(0, len(ROLES), len(ends)).tolist())
        sequences.span_weights.append(rng.choice([math.nan, 0.0, 1.0, 0.1, -0.5], len(ends)).tolist())
        sequences.conditions.append(str(rng.choice(["a", "b", "c"])))
        sequences.span_conditions.append([sequences.conditions[-1]] * len(ends))
        sequences.span_prefixes.append([0] * len(ends))
        sequences.rewards.append(float(rng.normal()))
        sequences.lines.append(1)
        sequences.files.append("x")
    return sequences


def write(folder, vocab_size, seed, at_once=60):
    """A data set of these sequences, in shards of `at_once`."""
    drawn = draw_sequences(vocab_size, seed)
    with pytest.MonkeyPatch.context() as patch, StoreWriter(folder, vocab_size) as writer:
        patch.setattr(store_writer, "SHARD_TOKENS", 1)
        for first in range(0, 60, at_once):
            writer.add(Sequences(**{name: column[first : first + at_once] for name, column in vars(drawn).items()}))
        writer.seal(MANIFEST)
        publish([writer])
    return folder


@pytest.fixture(scope="module", params=[1 << 16, (1 << 16) + 1], ids=["16 bits", "32 bits"])
def written(request, tmp_path_factory):
    """A folder of four shards, and what was written there."""
    folder = write(tmp_path_factory.mktemp("store") / "data", request.param, seed=request.param, at_once=17)
    assert len(manifest.read_manifest(folder)["shards"]) == 4
    return folder, draw_sequences(request.param, request.param)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Several passes over every shard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BLOCK", 7)
        yield


def test_the_records_ids_and_weights_are_read_as_written(written):
    folder, drawn = written
    for i, example in enumerate(TokenDataset(folder)):
        weights = []
        for end, role, own in zip(drawn.span_ends[i], drawn.span_roles[i], drawn.span_weights[i], strict=True):
            weights += [float(role == ASSISTANT) if math.isnan(own) else own] * (end - len(weights))
        assert example.input_ids.tolist() == drawn.input_ids[i].tolist()
        assert example.loss_weights.tolist() == np.array(weights, np.float32).tolist()
        assert example.condition == drawn.conditions[i]


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=40)
@given(drawn=st.data())
def test_a_batch_is_its_examples_laid_end_to_end(written, rule, drawn):
    """And counts what they hold: the first token is no label, even where a shard gives it a weight."""
    data = TokenDataset(written[0], **RULES[rule], only_class=drawn.draw(st.sampled_from(["", "b"])))
    chosen = drawn.draw(st.lists(st.integers(0, len(data) - 1), max_size=8))
    total = int(data.lengths[chosen].sum())
    shape = drawn.draw(st.sampled_from([{}, {"pad_to": total + 600}, {"pad_to": total + 1, "num_documents": 64}]))
    found = data.batch(chosen, **shape)
    wanted = pack([data[i] for i in chosen], chosen, data.class_ids[chosen].tolist(), **shape)
    for name in TENSORS:
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert all(getattr(found, name) == getattr(wanted, name) for name in FACTS)
    assert data.supervised[chosen].tolist() == [np.count_nonzero(data[i].loss_weights[1:]) for i in chosen]


def test_a_mean_is_by_message_though_its_spans_differ_in_weight(tmp_path):
    """Spans of one role that follow each other are one message, within a sequence."""
    roles = [ROLES.index(role) for role in ("prefix", "assistant", "assistant", "prefix", "assistant")]
    said = Sequences()
    for _ in range(2):
        said.input_ids.append(np.arange(10, dtype=np.uint32))
        said.span_ends.append([1, 3, 7, 8, 10])
        said.span_roles.append(roles)
        said.span_weights.append([math.nan, 0.0, 0.5, math.nan, 1.0])
        said.span_conditions.append(["a"] * 5)
        said.span_prefixes.append([0] * 5)
        said.conditions.append("a")
        said.rewards.append(math.nan)
        said.lines.append(1)
        said.files.append("x")
    with StoreWriter(tmp_path / "data", 100) as writer:
        writer.add(said)
        writer.seal(MANIFEST)
        publish([writer])
    data = TokenDataset(tmp_path / "data", weights=WeightsConfig(per_message_mean=True))
    expected = [0, 0, 0, *[0.5 / 6] * 4, 0, 0.5, 0.5]
    for example in data:
        np.testing.assert_allclose(example.loss_weights, np.array(expected, np.float32), rtol=1e-6)
    assert data.manifest["roles"] == ["bos", "system", "prefix", "user", "assistant"], "as before there were tools"


@pytest.mark.parametrize("rule", ["record", "classes", "reward", "none"])
def test_a_mean_of_conversations_divides_by_their_supervised_labels(written, rule):
    """So each conversation weighs what one of its tokens did, if its own weights are alike, however long it is; what is
    not supervised does not count, nor does a first token, which is no label."""
    folder, drawn = written
    plain = RULES[rule].get("weights", WeightsConfig())
    classes = RULES[rule].get("classes")
    mean = WeightsConfig(plain.source, plain.beta, per_conversation_mean=True)
    undivided, data = (TokenDataset(folder, classes=classes, weights=each) for each in (plain, mean))
    assert data.supervised.tolist() == undivided.supervised.tolist() and 0 in data.supervised
    for before, after, count in zip(undivided, data, data.supervised, strict=True):
        expected = before.loss_weights / np.float32(max(count, 1))
        np.testing.assert_allclose(after.loss_weights[1:], expected[1:], rtol=1e-6)
        if rule == "none" and count:
            assert after.loss_weights[1:].sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("index", [-1, 60])
def test_an_index_outside_is_refused(written, index):
    with pytest.raises(IndexError, match="of 60"):
        TokenDataset(written[0]).batch([0, index])


def put(column, place, value):
    return lambda columns: columns[column].__setitem__(place, value)


OUTSIDE = [  # a sequence that lies outside its columns
    ("offsets", 0, 1), ("offsets", -1, 10**12), ("offsets", 3, 10**12), ("offsets", 3, -(2**63)), ("offsets", 4, 0),
    ("span_offsets", 0, 1), ("span_offsets", -1, 10**12), ("span_offsets", 2, -5), ("span_offsets", 3, 10**12),
    ("span_ends", 0, 10**6), ("span_ends", 5, -1), ("span_roles", 1, 200), ("class_ids", 2, 3),
]  # fmt: skip
UNFIT = [  # columns that do not fit together
    (lambda columns: columns.update(rewards=columns["rewards"][:-1]), "rewards has 59 entries, not 60"),
    (lambda columns: columns.update(offsets=columns["offsets"][:0]), "offsets has 0 entries, not 61"),
    (lambda columns: columns.update(lines=columns["lines"].astype(np.int32)), "lines is no list of int64"),
    (lambda columns: columns.pop("files"), "files is no list of uint16"),
    (lambda columns: columns.update(input_ids=columns["input_ids"].astype(np.int64)), "no list of uint16 or"),
]
DAMAGE = [(put(*where), r"(sequence \d+ lies outside|.*not run)") for where in OUTSIDE] + UNFIT


@pytest.mark.parametrize(("change", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_shard_is_refused(tmp_path, change, message):
    """With a manifest that fits."""
    folder = write(tmp_path / "data", 1 << 16, seed=3)
    path = folder / "shard-00000.safetensors"
    columns = {name: column.copy() for name, column in load_file(path).items()}
    change(columns)
    save_file(columns, path)
    record = manifest.read_manifest(folder)
    record["shards"][0] |= manifest.describe_file(path)
    manifest.write_manifest(folder / "manifest.json", record)
    with pytest.raises(DataError, match=rf"shard-00000\.safetensors: damaged \(.*{message}"):
        TokenDataset(folder)


def write_sparse(folder, num_sequences):
    """A data set whose tokens are a hole in the file."""
    folder.mkdir()
    steps = np.arange(num_sequences + 1, dtype=np.int64)
    columns = {
        "offsets": steps * LENGTH,
        "span_offsets": steps,
        "lines": steps[:-1],
        "span_ends": np.full(num_sequences, LENGTH, np.int32),
        "span_weights": np.full(num_sequences, np.nan, np.float32),
        "rewards": np.full(num_sequences, np.nan, np.float32),
        "class_ids": (steps[:-1] % 2).astype(np.uint16),
        "files": np.zeros(num_sequences, np.uint16),
        "span_roles": np.full(num_sequences, ASSISTANT, np.uint8),
    }
    whole, num_tokens = save(columns), num_sequences * LENGTH
    begin = 8 + int.from_bytes(whole[:8], "little")
    header, end = json.loads(whole[8:begin]), len(whole) - begin
    header["input_ids"] = {"dtype": "U16", "shape": [num_tokens], "data_offsets": [end, end + 2 * num_tokens]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "shard-00000.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + whole[begin:])
        file.truncate(file.tell() + 2 * num_tokens)
    shard = {"file": path.name, "sha256": "0" * 64, "bytes": path.stat().st_size, "sequences": num_sequences}
    record = MANIFEST | {"format": "ochat-tokens", "version": 1, "classes": ["GPT4", "GPT3"], "files": ["a"]}
    record |= {"roles": list(ROLES), "shards": [shard | {"tokens": num_tokens}]}
    manifest.write_manifest(folder / "manifest.json", record)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    return write_sparse(folder / "small", 2), write_sparse(folder / "large", NUM_SEQUENCES)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("options", "share", "bytes_each"), [({}, 1, 14), ({"only_class": "GPT3"}, 0.5, 18)], ids=["whole", "selection"]
)
def test_opening_holds_a_few_bytes_a_sequence_and_reads_no_token(folders, options, share, bytes_each):
    env = tiny.environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", OPEN, *map(str, folders), repr(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    own_kib, peak_kib, num_sequences, num_tokens = map(int, done.stdout.split())
    assert (num_sequences, num_tokens) == (NUM_SEQUENCES * share, 3 * LENGTH)
    assert own_kib * 1024 <= bytes_each * num_sequences + 2 * MIB
    mapped = 8 + 8 + 4 + 4 + 1 + 2 + 4  # offsets, span offsets, one span, class, reward: shared pages of the file
    assert peak_kib * 1024 <= (mapped + 32) * NUM_SEQUENCES + 8 * MIB  # ids are 10,000 bytes a sequence
