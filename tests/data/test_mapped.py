"""What a large data set costs to open: a few bytes a sequence: pytest tests/data/test_mapped.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ochat.data import shards
from ochat.data.weights import ASSISTANT, ROLES
from ochat.text import template

ROOT = Path(__file__).parents[2]
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
    names = {"i8": "I64", "i4": "I32", "f4": "F32", "u2": "U16", "u1": "U8"}
    header, end = {}, 0
    for name, column in columns.items():
        begin, end = end, end + column.nbytes
        header[name] = {"dtype": names[column.dtype.str[1:]], "shape": [len(column)], "data_offsets": [begin, end]}
    num_tokens = num_sequences * LENGTH
    header["input_ids"] = {"dtype": "U16", "shape": [num_tokens], "data_offsets": [end, end + 2 * num_tokens]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "shard-00000.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column.tobytes())
        file.truncate(file.tell() + 2 * num_tokens)
    shard = {"file": path.name, "sha256": "0" * 64, "bytes": path.stat().st_size, "sequences": num_sequences}
    manifest = {"format": "ochat-tokens", "version": 1, "template": template.load("openchat_v3.2").to_dict()}
    manifest |= {"tokenizer": {"fingerprint": ""}, "context": LENGTH, "conditions": "both", "counts": {}}
    manifest |= {"classes": ["GPT4", "GPT3"], "roles": ROLES, "files": ["a"]}
    shards.write_manifest(folder / "manifest.json", manifest | {"shards": [shard | {"tokens": num_tokens}]})
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
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, so that only what is held counts
    command = [sys.executable, "-c", OPEN, *map(str, folders), repr(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    own_kib, peak_kib, num_sequences, num_tokens = map(int, done.stdout.split())
    assert (num_sequences, num_tokens) == (NUM_SEQUENCES * share, 3 * LENGTH)
    assert own_kib * 1024 <= bytes_each * num_sequences + 2 * MIB
    mapped = 8 + 8 + 4 + 4 + 1 + 2 + 4  # offsets, span offsets, one span, class, reward: shared pages of the file
    assert peak_kib * 1024 <= (mapped + 32) * NUM_SEQUENCES + 8 * MIB  # ids are 10,000 bytes a sequence
