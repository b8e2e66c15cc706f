"""What a batch costs on one core: to build, and how long a training thread waits for it.

    python -m benchmarks.loader --out benchmarks/results/loader.csv
Two synthetic data sets: chats (log-normal, median 180 tokens) and long conversations (half of them cut at 2,048). Rows:
`build`, microseconds for one batch; `definition`, the same batch by batch.pack; `wait`, what `next()` takes if a step
lasts 20 ms; `loop`, how much slower the consumer's own Python runs while the loader's thread is busy (1: not at all).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import csv_file
from ochat.data import batch
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.data.store_writer import Sequences, StoreWriter, publish
from ochat.data.weights import ROLES
from ochat.text import template

BUDGET = 40_960
STEP_S = 0.02
COLUMNS = ["date", "commit", "cpu", "load", "python", "torch"]  # load: processes that want a core
COLUMNS += ["data", "padded", "documents", "what", "repeats", "median", "p20", "p80", "unit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="in each data set")
    args = parser.parse_args()
    rows = csv_file.CsvFile(args.out, COLUMNS)
    rng = np.random.default_rng(0)
    chats = np.clip(rng.lognormal(np.log(181), 0.9, args.tokens // 270), 12, 4096)
    long = np.clip(rng.lognormal(np.log(2000), 0.9, args.tokens // 1450), 100, 2048)
    for name, lengths in {"chats": chats.astype(np.int64), "long": long.astype(np.int64)}.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "data", lengths, rng)
            data = TokenDataset(Path(folder) / "data")
            for pad in (False, True):
                measure(rows, name, data, pad)


def measure(rows: csv_file.CsvFile, name: str, data: TokenDataset, pad: bool) -> None:
    """All rows of one data set."""
    loader = Loader(data, token_budget=BUDGET, bins_per_step=1, pad=pad)
    bins = [loader.plan(0).bin(i) for i in range(min(200, loader.num_steps))]
    facts: dict[str, object] = {"load": os.getloadavg()[0], "data": name, "padded": pad}
    facts |= csv_file.stamp_cpu(COLUMNS) | {"documents": round(float(np.mean([len(b) for b in bins])))}

    def row(what: str, values: list[float], unit: str) -> None:
        times = csv_file.spread(values)
        rows.add(facts | times | {"what": what, "repeats": len(values), "unit": unit})
        print(f"{name:6} padded {pad!s:5} {what:10} {times['median']:10.4g} {unit}")

    shape: dict[str, Any] = {"pad_to": loader.pad_to, "num_documents": loader.num_documents}
    data.batch(bins[0], **shape)  # compiles
    row("build", [us(lambda b=b: data.batch(b, **shape)) for b in bins], "us")
    row("definition", [us(lambda b=b: define(data, b, shape)) for b in bins[:40]], "us")
    row("wait", list(islice(waits(loader.iterate()), 100)), "us")
    row("loop", slowdowns(loader), "ratio")


def define(data: TokenDataset, indices: np.ndarray, shape: dict[str, Any]) -> batch.PackedBatch:
    """The batch by its definition."""
    return batch.pack([data[int(i)] for i in indices], indices.tolist(), data.class_ids[indices].tolist(), **shape)


def us(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return (time.perf_counter() - before) * 1e6


def waits(steps: Iterator) -> Iterator[float]:
    """How long a consumer that is busy for STEP_S waits for the batches of each step."""
    next(steps)
    while True:
        time.sleep(STEP_S)
        yield us(lambda: next(steps))


def slowdowns(loader: Loader) -> list[float]:
    """Time of a Python loop while the loader's thread is busy, over its time alone."""
    alone = min(us(spin) for _ in range(20))
    steps = loader.iterate(prefetch=10_000)  # more than there are: the thread never waits
    next(steps)
    return [us(spin) / alone for _ in range(20)]


def spin() -> None:
    for _ in range(40_000):
        pass


def write(
    folder: Path,
    lengths: np.ndarray,
    rng: np.random.Generator,
    *,
    vocab_size: int = 32_002,
    fingerprint: str = "",
    pair: int = 300,
    supervised: float = 0.49,
) -> None:
    """A data set of random ids: bos, then prefix and text of the user and of the assistant in turn, `pair` tokens
    together, of which the assistant's text is the share `supervised`. `fingerprint`: the tokenizer's."""
    sequences = Sequences()
    answer = min(round(pair * supervised), pair - 6)
    texts = (("user", pair - 6 - answer), ("assistant", answer))
    for i, length in enumerate(lengths.tolist()):
        ends, roles, begin = [1], [ROLES.index("bos")], 1
        for turn in range(2 * (1 + length // pair)):
            for role, size in (("prefix", 3), texts[turn % 2]):
                ends.append(begin := min(begin + size, length))
                roles.append(ROLES.index(role))
        ends[-1] = length
        sequences.input_ids.append(rng.integers(0, vocab_size - 2, length).astype(np.uint32))
        sequences.span_ends.append(ends)
        sequences.span_roles.append(roles)
        sequences.span_weights.append([np.nan] * len(ends))
        sequences.conditions.append(("GPT4", "GPT3")[i % 2])
        sequences.span_conditions.append([sequences.conditions[-1]] * len(ends))
        sequences.span_prefixes.append([0] * len(ends))
        sequences.rewards.append(np.nan)
        sequences.lines.append(i + 1)
        sequences.files.append("synthetic")
    manifest = {"template": template.load("openchat_v3.2").to_dict(), "tokenizer": {"fingerprint": fingerprint}}
    manifest["context"] = int(lengths.max())
    with StoreWriter(folder, vocab_size) as writer:
        writer.add(sequences)
        writer.seal(manifest)
        publish([writer])


if __name__ == "__main__":
    main()
