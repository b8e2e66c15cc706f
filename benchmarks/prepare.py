"""Time `ochat prepare` and the tokenizers library's own batch calls on the same texts, in turns: rows of a CSV.

    PYTHONPATH=.:kernels python -m benchmarks.prepare --out prepare.csv --input chats.jsonl \
        --base bases/llama3=openchat_3.6 bases/llama2=openchat_v3.2 [--repeats 3] [--workers 2]
`prepare` is the whole command: start of the processes, reading, JSON, tokenising, cutting, writing, checksums. The
library's time is its batch call alone. CPU seconds are those of all processes: they distinguish a slow program from a
busy machine. A base needs a tokenizer.json, which `ochat init-base` writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import tokenizers

from benchmarks import csv_file
from ochat.data.readers import RecordFile
from ochat.errors import DataError
from ochat.text import record_formats

COLUMNS = [
    *("date", "commit", "cpu", "cores", "load", "python", "library", "input", "mb", "tokenizer", "template"),
    *("implementation", "repeats", "texts", "mtokens", "median_s", "p20_s", "p80_s", "median_cpu_s"),
    *("mtokens_per_s", "mtokens_per_cpu_s"),
]
TEXTS_PER_CALL = 4096  # all of them in one call would need 150 bytes a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV that rows are added to")
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--base", nargs="+", required=True, metavar="BASE=TEMPLATE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    rows = csv_file.CsvFile(options.out, COLUMNS)
    for path in options.input:
        for base in options.base:
            folder, _, template = base.partition("=")
            for row in measure(path, folder, template, options.repeats, options.workers):
                rows.add(row)
                print({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})


def measure(path: Path, base: str, template: str, repeats: int, workers: int) -> Iterator[dict]:
    """A row for each implementation."""
    library = tokenizers.Tokenizer.from_file(str(Path(base) / "tokenizer.json"))
    texts = texts_of(path)
    parts = [texts[at : at + TEXTS_PER_CALL] for at in range(0, len(texts), TEXTS_PER_CALL)]
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], object]] = {
            "encode_batch": lambda: [library.encode_batch(part, add_special_tokens=False) for part in parts],
            "encode_batch_fast": lambda: [library.encode_batch_fast(part, add_special_tokens=False) for part in parts],
            "ochat prepare": lambda: prepare(path, base, template, f"{folder}/out", workers),
        }
        rounds = [{label: timed(call) for label, call in calls.items()} for _ in range(repeats)]
    num_tokens = sum(len(e.ids) for part in parts for e in library.encode_batch_fast(part, add_special_tokens=False))
    about = csv_file.stamp_cpu(COLUMNS) | {
        "cores": len(os.sched_getaffinity(0)), "library": f"tokenizers {version('tokenizers')}", "template": template,
        "load": os.getloadavg()[0], "input": path.name, "mb": path.stat().st_size / 1e6, "tokenizer": Path(base).name,
    }  # fmt: skip
    for label in calls:
        walls_s, cpus_s = zip(*(each[label] for each in rounds), strict=True)
        median_s, p20_s, p80_s = csv_file.spread(walls_s).values()
        median_cpu_s, mtokens = statistics.median(cpus_s), num_tokens / 1e6
        yield about | {
            "implementation": label, "texts": len(texts), "repeats": repeats, "mtokens": mtokens,
            "median_s": median_s, "p20_s": p20_s, "p80_s": p80_s, "median_cpu_s": median_cpu_s,
            "mtokens_per_s": mtokens / median_s, "mtokens_per_cpu_s": mtokens / median_cpu_s,
        }  # fmt: skip


def texts_of(path: Path) -> list[str]:
    """Every message and system text; ids of role prefixes are cached by `prepare`, so they are left out."""
    texts: list[str] = []
    for record in RecordFile(path):
        try:
            conversation = record_formats.convert(record.value())
        except DataError:
            continue
        texts += [conversation.system, *(message.content for message in conversation.items)]
    return [text for text in texts if text]


def prepare(path: Path, base: str, template: str, output: str, workers: int) -> None:
    """The command as a user starts it; within this process, its workers would import what the benchmark does."""
    options = ["--input", path, "--base", base, "--template", template, "--output", output, "--workers", str(workers)]
    command = [sys.executable, "-m", "ochat", "prepare", *options, "--on-bad", "skip", "--overwrite", "--no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and processor seconds of this process and of those that it started."""
    begin, before = time.perf_counter(), sum(os.times()[:4])
    call()
    return time.perf_counter() - begin, sum(os.times()[:4]) - before


if __name__ == "__main__":
    main()
