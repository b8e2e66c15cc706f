"""Input written to harm: refused in one line, in bounded memory and time, and nothing in it is ever run.

pytest tests/laws/test_hostile.py          (with -m slow: a line of 1 GB, and bombs of 4 GB)
"""

import bz2
import functools
import gzip
import json
import lzma
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from safetensors.torch import save_file

from ochat import config as configuration
from ochat.commands.init_base import InitBaseOptions
from ochat.commands.init_base import main as init_base
from ochat.data import manifest as manifests
from ochat.data.containers import pieces, tables
from ochat.data.dataset import TokenDataset
from ochat.data.prepare import prepare
from ochat.data.readers import RecordFile
from ochat.data.records import Record
from ochat.data.scores.token_file import TokenWeights
from ochat.errors import CheckpointError, ConfigError, DataError
from ochat.files import bounded_json, checksums
from ochat.model.config import ModelConfig
from ochat.model.safetensors_files import INDEX, open_folder
from ochat.plan import lengths
from ochat.text import tokenizer
from ochat.text.conversation import Conversation
from tests import text_kit, tiny
from tests.tiny import write_tokenizer

LLAMA = tiny.MODEL
F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


# safetensors


@pytest.mark.parametrize(
    "header",
    [
        {"a": F32 | {"shape": [-4]}},
        {"a": F32 | {"shape": [8]}},
        {"a": F32 | {"shape": [2**62, 2**62]}},
        {"a": F32 | {"shape": [2**62, 2**62, 0]}},
        {"a": F32 | {"shape": [4.0]}},
        {"a": F32 | {"data_offsets": [-1, 16]}},
        {"a": F32 | {"data_offsets": [16, 0]}},
        {"a": F32 | {"shape": [16], "data_offsets": [0, 64]}},
        {"a": F32 | {"shape": [2], "data_offsets": [0, 8]}},
        {"a": F32 | {"shape": [2], "data_offsets": [8, 16]}},
        {"a": F32, "b": F32},
        {"a": F32 | {"dtype": "F31"}},
        {"a": {"dtype": "F32"}},
        {"__metadata__": {"a": {}}, "a": F32},
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": ' + json.dumps(F32).encode() + b"}",
        b'{"a": {"dtype": "F32", "dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b"",
        *(2**64 - 1, 2**63, 2**40, 10**8 + 1),
        json.dumps({"a": F32}).encode() + b" " * (1 << 26),
    ],
    ids=range(25),
)
def test_a_header_that_lies_is_refused(tmp_path, header):
    """Sizes, offsets, types and names, the library's checks and ours together; its length alone, as a number, too."""
    text = (
        header if isinstance(header, bytes) else json.dumps({"a": F32} if isinstance(header, int) else header).encode()
    )
    size = struct.pack("<Q", header if isinstance(header, int) else len(text))
    (tmp_path / "model.safetensors").write_bytes(size + text + bytes(16))
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        open_folder(tmp_path)


def test_a_header_is_bounded_before_it_is_parsed(tmp_path, monkeypatch):
    """In weights and in token weights: the library would parse 100 MB."""
    text = b'{"a": ' + json.dumps(F32).encode() + b"}" + b" " * (1 << 25)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("it was parsed"))
    monkeypatch.setattr("ochat.files.safetensors_header.safe_open", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(CheckpointError, match="a header of 33,"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="a header of 33,"):
        TokenWeights.open(tmp_path / "model.safetensors", [])


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../x.safetensors", "a\0.safetensors", "..", {}])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="weight_map\\['a'\\]"):
        open_folder(tmp_path)


def test_a_device_or_a_pipe_is_no_file_of_weights(tmp_path):
    """Reading either would never end; a link out of the folder to a file is how the hub's cache looks, and is fine."""
    save_file({"a": __import__("torch").zeros(4)}, tmp_path / "blob")
    (tmp_path / "base").mkdir()
    link = tmp_path / "base" / "x.safetensors"
    (tmp_path / "base" / INDEX).write_text(json.dumps({"weight_map": {"a": link.name}}))
    os.mkfifo(tmp_path / "pipe")
    for target in ("/dev/zero", tmp_path / "pipe", tmp_path):
        link.symlink_to(target)
        with pytest.raises(CheckpointError, match="x.safetensors is missing"):
            open_folder(tmp_path / "base")
        link.unlink()
    link.symlink_to("../blob")
    assert list(open_folder(tmp_path / "base")) == ["a"]


# config.json, and JSON files in general


@pytest.mark.parametrize("value", [10**12, 10**400, -1, 0, 1.5, 1e400, "64", True, [], {}, [10**12]])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
def test_a_config_of_absurd_sizes_is_refused_at_once(tmp_path, key, value):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
    with pytest.raises(ConfigError, match=f"config.json: {key}"):
        ModelConfig.load(tmp_path)
    # a family that lists a window for each layer would build a list of a thousand million
    record = LLAMA | {"model_type": "mistral", "num_hidden_layers": 10**9, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000; no model has more than 4,096"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("key", sorted(LLAMA))
def test_no_key_of_a_config_can_be_of_another_kind(tmp_path, key):
    for value in ([[]], {"a": {}}, [None], "\u0000", -(10**30), float("nan"), [10**30], 10**400, False):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {key: value}))
        with pytest.raises(ConfigError, match="config.json: "):
            ModelConfig.load(tmp_path)


def test_a_random_model_larger_than_the_machine_is_not_begun(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"hidden_size": 1 << 18, "intermediate_size": 1 << 21}))
    with pytest.raises(ConfigError, match="GB in float32"):
        init_base(InitBaseOptions(tmp_path / "out", random=tmp_path / "config.json"))


NO_OBJECT = (
    b"[" * 10**6, b'{"a":' * 10**6, b'{"a": ' + b"9" * 5000 + b"}", b"\xff{}", b'{"a": "\\ud800"}', b"1", b"", b"{},",
    b'{"a":' * 100 + b"1" + b"}" * 100, b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
)  # fmt: skip


@pytest.mark.parametrize("content", NO_OBJECT, ids=range(len(NO_OBJECT)))
def test_a_file_that_is_no_plain_json_object_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match="x.json: .*; fetch it again$"):
        bounded_json.read_object(tmp_path / "x.json", DataError, "fetch it again")


def test_a_file_of_json_is_read_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_json, "MAX_BYTES", 1000)
    (tmp_path / "config.json").write_bytes(json.dumps(LLAMA).encode() + b" " * 1000)
    with pytest.raises(ConfigError, match="config.json: more than"):
        ModelConfig.load(tmp_path)


# a configuration in TOML


TOML = (
    "a = " + "[" * 10_000, "a." * 5_000 + "b = 1", "a = " + "9" * 5_000, "[data]\n[data]", "[run]\nseed = 1\nseed = 2",
    "[data]\ntoken_budget = " + "9" * 400, "[optim]\nlr = 1" + "0" * 400, "[optim]\nlr = nan", "[data]\nmix = 3", "\0",
    "[run]\ndir = {}", "[[run]]", "a = 9999-99-99", "[optim]\nbetas = [1]", "# \ud800",
)  # fmt: skip


@pytest.mark.parametrize("text", TOML, ids=range(len(TOML)))
def test_a_hostile_configuration_is_refused(tmp_path, text):
    (tmp_path / "run.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError):
        configuration.load(tmp_path / "run.toml", ["--base.path=b", "--data.path=d"])


# the manifest of a data set; whoever writes one can write its digest too


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [{"file": "../outside.safetensors"}]},
        {"shards": [{"file": "/etc/passwd", "part": 0}]},
        {"shards": [{"bytes": -1}]},
        {"shards": [{"tokens": 10**30}]},
        {"shards": [{"bytes": 1e3}]},
        {"shards": [None]},
        {"shards": {"0": {}}},
        {"others": [{"file": "../../etc/passwd", "bytes": 1, "sha256": "0" * 64}]},
        {"classes": ["GPT4", "GPT4"]},
        {"classes": list(map(str, range(70_000)))},
        {"classes": [["GPT4"]]},
        {"parts": []},
        {"parts": [{}], "version": 2},
        {"tokenizer": "x"},
        {"template": []},
        {"template": {"prefix": 3}},
        {"counts": {"kept": -1}},
        {"shard": {"number": "1"}},
        {"version": [1]},
    ],
)
def test_a_manifest_that_lies_is_refused(world, tmp_path, change):
    manifest = manifests.read_manifest(world.data)
    for shard in manifest["shards"]:
        os.link(world.data / shard["file"], tmp_path / shard["file"])
    if isinstance(change.get("shards"), list) and change["shards"][0]:
        change = change | {"shards": [manifest["shards"][0] | change["shards"][0]]}
    manifests.write_manifest(tmp_path / manifests.MANIFEST, manifest | change)
    with pytest.raises((DataError, ConfigError), match="manifest.json"):
        TokenDataset(tmp_path)


# conversations


def prepared(base, source, output, **options):
    """What `ochat prepare` says to this input."""
    with pytest.raises(DataError) as error:
        prepare([source], base, "openchat_v3.2", output, progress=False, **options)
    return str(error.value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("base"))


def test_no_depth_is_just_deep_enough_to_be_read_and_not_shown():
    """Where reading just works, printing in a message, further down in Python's stack, might not."""
    for depth in [*range(100, 900, 50), *range(900, 1000), *range(1000, 12_000, 500)]:
        nested = b"[" * depth + b"]" * depth
        for line in (b'{"items": [{"role": "user", "content": %s}]}', b'{"items": [], "reward": %s}', b'{"items": %s}'):
            with pytest.raises(DataError):
                Conversation.from_dict(Record("x", 1, 1, line % nested).value())


def test_what_a_record_may_take_is_bounded(base, tmp_path, monkeypatch):
    """In lines, arrays and blanks, plain or compressed; the bound is made small to be met."""
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(pieces, "MAX_RECORD_BYTES", 1 << 20)
    for content, says in (
        (b'{"items": "' + b"x" * (3 << 20), "more than 1 MiB"),
        (b'[{"items": "' + b"x" * (3 << 20), "more than 1 MiB"),
        (b"[[" + b"[]," * (1 << 20), "more than 1 MiB"),
        (b" " * (3 << 20), "1 MiB of blanks"),
    ):
        for pack in (bytes, gzip.compress, bz2.compress, lzma.compress, zstandard.compress):
            (tmp_path / "in.jsonl").write_bytes(pack(content))
            assert says in prepared(base, tmp_path / "in.jsonl", tmp_path / "out")


def test_a_parquet_row_is_bounded_too(base, tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr("ochat.data.containers.tables.MAX_RECORD_BYTES", 1 << 20)
    rows = ["x", "y" * (2 << 20), "z"]
    column = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": row}] for row in rows]
    pyarrow.parquet.write_table(pyarrow.table({"items": column}), tmp_path / "in.parquet")
    assert "in.parquet:2: a row of more than 1 MiB" in prepared(base, tmp_path / "in.parquet", tmp_path / "out")
    found = [record.error for record in RecordFile(tmp_path / "in.parquet")]
    assert [bool(error) for error in found] == [False, True, False]


def test_rows_that_share_a_text_end_where_no_real_file_would_be(tmp_path):
    """Two kilobytes that hold gigabytes, in a table and compressed; a plain file of the same is as large as it says."""
    import pyarrow
    import pyarrow.parquet

    text = "The quick brown fox. " * (1 << 17)
    shared = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, pyarrow.int32()), [text])
    pyarrow.parquet.write_table(pyarrow.table({"text": shared}), tmp_path / "in.parquet", compression="zstd")
    line = json.dumps({"text": text}).encode() + b"\n"
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(line * 40))
    (tmp_path / "in.jsonl").write_bytes(line * 40)
    for name, says in (
        ("in.parquet", "more than 1,000 times"),
        ("in.jsonl.zst", "more than 1,000 times"),
        ("in.jsonl", ""),
    ):
        found = list(RecordFile(tmp_path / name))
        assert says in found[-1].error and not any(record.error for record in found[:-1])
        assert bool(found[-1].error) == bool(says)
        assert sum(len(record.data) for record in found) <= 40 * len(line)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "qwen"])
def test_special_tokens_in_content_are_text(tmp_path, kind):
    """Alone, doubled, in words and split by other tokens; of all the tokenizer has, added ones too."""
    tokens = tokenizer.load(text_kit.small_folder(kind, tmp_path), ("<|end_of_turn|>",))
    live = set(tokens.special_tokens.values())
    unknown = tokens.special_tokens.get("<unk>")
    for token in tokens.special_tokens:
        for text in (token, token * 2, f"a{token}b", f" {token} ", token[:3] + token + token[3:]):
            ids = tokens.encode(text)
            assert not (live - {unknown}) & set(ids), (token, text)
            assert tokens.encode_batch([text]) == [ids]


# numbers, tokenizers, templates: nothing is run


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_a_numpy_file_is_not_loaded(tmp_path):
    array = np.array([Bomb(tmp_path / "ran")], dtype=object)
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "b.npy", array, allow_pickle=True)
    (tmp_path / "c.npy").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    (tmp_path / "d.npy").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "e.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}")
    for name in ("a.npy", "b.npy", "b.npy.npz", "c.npy", "d.npy", "e.npy"):
        with pytest.raises(DataError, match=name):
            lengths.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_bases_own_chat_template_is_never_run(world, tmp_path):
    """Neither in preparing, training and exporting, nor in what an export carries."""
    evil = "{{ cycler.__init__.__globals__.os.system('touch %s') }}EVIL" % (tmp_path / "ran")
    base = shutil.copytree(world.base, tmp_path / "base", ignore=shutil.ignore_patterns(checksums.SUMS))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": evil}))
    (base / "chat_template.jinja").write_text(evil)
    options = [f"--base.path={base}", "--data.max_steps=1", "--samples.max_new_tokens=1"]
    tiny.train(world, tmp_path / "run", *options, '--samples.prompts=["1+1"]')
    out = tmp_path / "run" / "export"
    assert not any("EVIL" in path.read_text() for path in [*out.glob("*.json"), *out.glob("*.jinja")])
    assert not (tmp_path / "ran").exists()


# the real thing

MEASURE = """
import sys
from ochat.data.readers import RecordFile

def peak_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

list(RecordFile(sys.argv[1]))
before = peak_mib()
errors = [record.error for record in RecordFile(sys.argv[2]) if record.error]
print(errors[-1:], peak_mib() - before)
"""


def measured(tmp_path, piece, count, start, pack=""):
    """(the last error, MiB that reading it took) of `start` and `count` pieces, packed; its size in bytes"""
    path, small = tmp_path / "x.jsonl", tmp_path / "small.jsonl"
    small.write_text("{}\n")
    opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "zst": zstandard.open}.get(pack, open)(path, "wb")
    with opened as file:
        file.write(start)
        for _ in range(count):
            file.write(piece)
    command = [sys.executable, "-c", MEASURE, small, path]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_AS, (8 << 30, 8 << 30))
    options = {"capture_output": True, "text": True, "env": tiny.environment(), "cwd": tiny.ROOT, "preexec_fn": limit}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    error, mib = done.stdout.rsplit(" ", 1)
    print(pack, start, error, int(mib), "MiB")
    return error, int(mib), path.stat().st_size


ZEROS, LARGE, PACKS = b"\0", "a line of more than 32 MiB", ("zst", "gz", "bz2", "xz")
BOMBS = [(b'{"a": "', ZEROS, 384, pack, LARGE, 200) for pack in PACKS]
STARTS = {b'{"items": "': b"x", b'[{"items": "': b"x", b'{"items": [': b"[],", b"[[": b"[],"}
SLOW = [(start, unit, 1024, "", "more than 32 MiB", 1500) for start, unit in STARTS.items()]
SLOW += [(b'{"a":1}\n', unit, 4096, pack, "", 300) for unit in (ZEROS, b" ") for pack in PACKS]


@pytest.mark.parametrize(
    ("start", "unit", "size_mib", "pack", "says", "most_mib"),
    BOMBS + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_a_bomb_or_a_gigabyte_on_one_line_takes_bounded_memory(tmp_path, start, unit, size_mib, pack, says, most_mib):
    error, mib, size = measured(tmp_path, unit * ((1 << 20) // len(unit)), size_mib, start, pack)
    assert says in error and mib < most_mib and (not pack or size < (size_mib << 20) / 384)
