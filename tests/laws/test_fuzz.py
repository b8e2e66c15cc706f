"""Whatever a file holds, it is read or refused by one of the documented errors: nothing else comes out, within seconds.

    pytest tests/laws/test_fuzz.py              fixed inputs, the same in every run
    pytest tests/laws/test_fuzz.py -m slow -s   many more, with their number by kind

Inputs are good files of each kind, damaged: bytes flipped, cut, doubled and inserted, and JSON whose values are swapped
for hostile ones; digests are made right again, as whoever means harm would. Random text alone rarely comes so far.
"""

import contextlib
import copy
import functools
import io
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ochat import config as configuration
from ochat.checkpoint import manifest
from ochat.checkpoint.manifest import verify_checkpoint
from ochat.data import manifest as data_manifest
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.data.readers import RecordFile
from ochat.distributed.processes import Ranks
from ochat.errors import OchatError
from ochat.files.checksums import SUMS
from ochat.files.checksums import expected as sums
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import INDEX, open_folder
from ochat.plan import lengths
from ochat.run import layout
from ochat.text import tokenizer
from ochat.text.conversation import Conversation
from tests import tiny
from tests.tiny import mixed_conversations

SECONDS = 5  # of the processor, for one input: a machine that has other work too says nothing about it
COUNTS: Counter[str] = Counter()

HOSTILE = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\0", "../../etc/passwd", "/etc/passwd", "\ud800", "x" * 5000, "<|end_of_turn|>", "0" * 64),
    *("model.safetensors", "shard-00000.safetensors", [], {}, [[]], [None], {"": 0}, [[[[]]]], [0, 0]),
    {"a": {"a": {"a": None}}},
]
hostile = st.sampled_from(HOSTILE).map(copy.deepcopy) | st.integers() | st.text(max_size=5)


# damage


@st.composite
def bytes_of(draw, content: bytes) -> bytes:
    """The content after one to four edits."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        # near the beginning as often as anywhere: there the headers are
        at = draw(st.integers(0, max(len(data) - 1, 0)) | st.integers(0, min(200, max(len(data) - 1, 0))))
        what = draw(st.sampled_from(["flip", "set", "cut", "insert", "delete", "double"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "set" and data:
            data[at] = draw(st.sampled_from(b'\0\xff[]{}",:-9e'))
        elif what == "cut":
            del data[at:]
        elif what == "insert":
            data[at:at] = draw(st.binary(max_size=8) | st.sampled_from([b"[" * 3000, b"9" * 5000, b"\xed\xa0\x80"]))
        elif what == "delete":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 400))]
    return bytes(data)


@st.composite
def values_of(draw, record):
    """The record after one to three of its values, at any depth, became hostile ones, went or were joined by others."""
    record = json.loads(json.dumps(record))
    for _ in range(draw(st.integers(1, 3))):
        at, depth = record, draw(st.integers(0, 4))
        while True:
            if not isinstance(at, dict | list) or not at:
                break
            key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if depth == 0 or not isinstance(at[key], dict | list) or not at[key]:
                what = draw(st.sampled_from(["swap", "swap", "swap", "drop", "join"]))
                if what == "swap":
                    at[key] = draw(hostile)
                elif what == "drop":
                    del at[key]
                elif isinstance(at, dict):
                    at[draw(st.text(max_size=5))] = draw(hostile)
                else:
                    at.append(draw(hostile))
                break
            at, depth = at[key], depth - 1
    return record


def damaged_json(record):
    """The record as the bytes of a file: its values swapped, or its text damaged."""
    return values_of(record).map(lambda r: json.dumps(r).encode()) | bytes_of(json.dumps(record).encode())


def attempt(kind: str, read) -> None:
    """Reads; anything but success and a documented error, and any slowness, is a failure."""
    started = time.process_time()
    try:
        read()
        COUNTS[f"{kind}: read"] += 1
    except OchatError as error:
        COUNTS[f"{kind}: refused"] += 1
        assert str(error).strip() and len(str(error)) < 20_000
    assert time.process_time() - started < SECONDS


# the kinds


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A folder to write into, and good files of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(world.data, folder / "data")
    shutil.copytree(world.base, folder / "base")
    (folder / "base" / SUMS).unlink()
    tiny.train(world, folder / "run", "--data.max_steps=1", "--samples.max_new_tokens=1")
    shutil.copytree(next((folder / "run" / "checkpoints").glob("step_*")), folder / "checkpoint")
    tiny.split(shutil.copytree(world.base, folder / "sharded"))
    (folder / "small").mkdir()
    save_file(
        {"a": torch.ones(2, 3), "b": torch.zeros(4)}, folder / "small" / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


# each gives the inputs of a kind, and what reads one of them


def through(path: Path, use):
    """A reader of contents: writes them to the file, then `use`s it."""
    path.parent.mkdir(exist_ok=True)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        use()

    return read


def conversation_files(place: Path):
    good = [json.dumps(record) for record in mixed_conversations(seed=1, count=4)]
    path, lines = place / "in.jsonl", "\n".join(good).encode()

    def use() -> None:
        for record in RecordFile(path):
            with contextlib.suppress(OchatError):
                Conversation.from_dict(record.value())
        shutil.rmtree(place / "out", ignore_errors=True)
        prepare([path], place / "base", "openchat_v3.2", place / "out", on_bad="skip", workers=0, progress=False)

    some = st.lists(st.sampled_from(good).map(json.loads).flatmap(values_of), min_size=1, max_size=3)
    some = some.map(lambda items: "\n".join(map(json.dumps, items)).encode())
    return bytes_of(lines) | bytes_of(f"[{','.join(good)}]".encode()) | some, through(path, use)


def data_manifests(place: Path):
    path = place / "data" / data_manifest.MANIFEST

    def read(record) -> None:
        is_object = isinstance(record, dict)
        path.write_text(json.dumps(record | {"digest": data_manifest.digest(record)}) if is_object else "[]")
        data_manifest.listed_checksums(path.parent)
        TokenDataset(path.parent)

    return values_of(json.loads(path.read_text())), read


def data_shards(place: Path):
    """Of the right size and sum by the manifest, so that only what is in it can be wrong."""
    source, folder = place / "data" / "shard-00000.safetensors", place / "shards"
    good = json.loads((place / "data" / data_manifest.MANIFEST).read_text())

    def use() -> None:
        size = (folder / source.name).stat().st_size
        shards = [good["shards"][0] | {"bytes": size}, *good["shards"][1:]]
        data_manifest.write_manifest(folder / data_manifest.MANIFEST, good | {"shards": shards})
        data = TokenDataset(folder)
        data.batch(range(min(3, len(data))))

    return bytes_of(source.read_bytes()), through(folder / source.name, use)


def checkpoint_manifests(place: Path):
    path = place / "checkpoint" / layout.MANIFEST

    def read(record) -> None:
        record.pop("sha256", None)
        path.write_text(json.dumps(record | {"sha256": manifest.digest(record)}))
        verify_checkpoint(path.parent, Ranks(0, 1, torch.device("cpu"), None))

    return values_of(json.loads(path.read_text())), read


def safetensors_files(place: Path):
    """As a whole model's file: opened, described, and every value read."""
    path = place / "small" / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")

    def join(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content[8 + size :]

    def use() -> None:
        for tensor in open_folder(path.parent).values():
            tensor.read()

    return bytes_of(content) | damaged_json(json.loads(content[8 : 8 + size])).map(join), through(path, use)


def shard_indices(place: Path):
    path = place / "sharded" / INDEX
    read = through(path, lambda: hf.open_tensors(path.parent, ModelConfig.load(place / "base")))
    return damaged_json(json.loads(path.read_text())), read


def model_configs(place: Path):
    good = json.loads((place / "base" / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    qwen = good | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}
    qwen |= {"sliding_window": 8, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"]}
    for key in ("attention_bias", "mlp_bias"):
        qwen.pop(key)

    def use() -> None:
        config = ModelConfig.load(place / "sharded")
        config.num_parameters(), config.to_hf()

    kinds = map(damaged_json, (good, good | {"rope_scaling": scaling}, qwen))
    return st.one_of(kinds), through(place / "sharded" / "config.json", use)


def run_configurations(place: Path):
    path, text = place / "run.toml", configuration.dump(configuration.load(place / "run" / "config.toml"))
    lines = st.lists(st.sampled_from(text.splitlines())).map(lambda x: "\n".join(x).encode())
    return bytes_of(text.encode()) | lines, through(path, lambda: configuration.dump(configuration.load(path)))


def tokenizer_files(place: Path):
    path = place / "tokenizer" / "tokenizer.json"
    read = through(path, lambda: tokenizer.load(path.parent, ("<|end_of_turn|>",)).encode("a b"))
    return damaged_json(json.loads((place / "base" / "tokenizer.json").read_text())), read


def checksum_files(place: Path):
    path = place / "sums" / SUMS
    good = b"".join(b"0" * 64 + b"  " + name + b"\n" for name in (b"model.safetensors", b"config.json"))
    return bytes_of(good), through(path, lambda: sums(path.parent))


def length_files(place: Path):
    plain, packed = io.BytesIO(), io.BytesIO()
    np.save(plain, np.arange(1, 50, dtype=np.int32))
    np.savez(packed, np.arange(1, 50, dtype=np.int32))
    read = through(place / "x.npy", lambda: lengths.read(place / "x.npy"))
    return bytes_of(plain.getvalue()) | bytes_of(packed.getvalue()), read


KINDS = (
    conversation_files, data_manifests, data_shards, checkpoint_manifests, safetensors_files, shard_indices,
    model_configs, run_configurations, tokenizer_files, checksum_files, length_files,
)  # fmt: skip


@pytest.fixture(scope="module")
def kinds(place):
    return {kind.__name__: kind(place) for kind in KINDS}


@pytest.mark.parametrize(
    "count", [60, pytest.param(5_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["some", "many"]
)
@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
def test_damage_is_read_or_refused(kinds, name, count):
    inputs, read = kinds[name]
    COUNTS.clear()

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(inputs)
    def one(content):
        attempt(name, functools.partial(read, content))

    one()
    print(dict(COUNTS))
