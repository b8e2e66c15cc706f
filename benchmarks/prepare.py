"""`ochat prepare` beside the tokenizer libraries' own batch calls over the very same texts, in turns: rows of a CSV.

    PYTHONPATH=.:kernels python -m benchmarks.prepare --out prepare.csv --input chats.jsonl \
        --base bases/llama3=openchat_3.6 bases/llama2=openchat_v3.2 [--repeats 3] [--workers 2]
`prepare` is the whole command: start of the processes, reading, JSON, tokenising, cutting, writing, checksums. A
library's time is its batch call alone, on as many threads. CPU seconds are those of all processes: they tell a slow
program from a busy machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from benchmarks import bench
from ochat.data import records
from ochat.errors import DataError
from ochat.text import record_formats, template, tokenizer
from ochat.text.template import Template
from ochat.text.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)

COLUMNS = [
    *("date", "commit", "machine", "cores", "load", "python", "library", "input", "mb", "tokenizer", "template"),
    *("implementation", "repeats", "texts", "mtokens", "median_s", "p20_s", "p80_s", "median_cpu_s"),
    *("mtokens_per_s", "mtokens_per_cpu_s"),
]
TEXTS_PER_CALL = 4096  # all of them in one call would need 150 bytes a token


class Mark(NamedTuple):
    """One measurement."""

    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the CSV that rows are added to")
    parser.add_argument("--input", nargs="+", type=Path, required=True)
    parser.add_argument("--base", nargs="+", required=True, metavar="BASE=TEMPLATE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    rows = bench.Rows(options.out, COLUMNS)
    for path in options.input:
        for base in options.base:
            folder, _, name = base.partition("=")
            for row in measure(path, folder, name, options.repeats, options.workers):
                rows.add(row)
    rows.close()


def measure(path: Path, base: str, name: str, repeats: int, workers: int) -> Iterator[dict]:
    """A row for each implementation."""
    tokens, form = tokenizer.load(base), template.load(name)
    texts = texts_of(path, form, tokens)
    with tempfile.TemporaryDirectory() as folder:
        calls = library_calls(tokens, texts, workers)
        calls["ochat prepare"] = lambda: whole(path, base, name, f"{folder}/out", workers)
        marks: dict[str, list[Mark]] = {label: [] for label in calls}
        for _ in range(repeats):
            for label, call in calls.items():
                marks[label].append(_timed(call))
    about = stamp(tokens) | {"input": path.name, "mb": path.stat().st_size / 1e6, "tokenizer": tokens.kind}
    num_tokens = 0
    for at in range(0, len(texts), TEXTS_PER_CALL):
        num_tokens += sum(map(len, tokens.encode_batch(texts[at : at + TEXTS_PER_CALL])))
    for label, taken in marks.items():
        row = about | {"template": name, "implementation": label, "texts": len(texts)} | summary(taken, num_tokens)
        yield row
        print({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})


def summary(marks: list[Mark], num_tokens: int) -> dict:
    """Medians of the measurements and tokens per second."""
    walls, cpus = [mark.wall_s for mark in marks], [mark.cpu_s for mark in marks]
    median_s, median_cpu_s = bench.percentile(walls, 50), bench.percentile(cpus, 50)
    return {
        "repeats": len(marks),
        "mtokens": num_tokens / 1e6,
        "median_s": median_s,
        "p20_s": bench.percentile(walls, 20),
        "p80_s": bench.percentile(walls, 80),
        "median_cpu_s": median_cpu_s,
        "mtokens_per_s": num_tokens / 1e6 / median_s,
        "mtokens_per_cpu_s": num_tokens / 1e6 / median_cpu_s,
    }


def texts_of(path: Path, form: Template, tokens: Tokenizer) -> list[str]:
    """Every text that the template has tokenised, prefixes too, as often as they come."""
    texts: list[str] = []
    for record in records.read(path):
        try:
            conversation = record_formats.convert(record.value())
        except DataError:
            continue
        for message in conversation.items:
            prefix = form.role_prefix(message.role, conversation.condition)
            texts += [part for part in tokens.split_at_specials(prefix) if part not in tokens.special_tokens]
            texts.append(message.content)
        texts.append(conversation.system)
    return [text for text in texts if text]


def whole(path: Path, base: str, name: str, output: str, workers: int) -> None:
    """The command as a user starts it; in this process, its workers would import what the benchmark does."""
    options = ["--input", path, "--base", base, "--template", name, "--output", output, "--workers", str(workers)]
    command = [sys.executable, "-m", "ochat", "prepare", *options, "--on-bad", "skip", "--overwrite", "--no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def library_calls(tokens: Tokenizer, texts: list[str], threads: int) -> dict[str, Callable[[], None]]:
    """The library's ways to encode many texts, by their names."""
    calls: dict[str, Callable[[list[str]], object]]
    if isinstance(tokens, JsonTokenizer):
        model = tokens._model
        calls = {
            "encode_batch": lambda part: model.encode_batch(part, add_special_tokens=False),
            "encode_batch_fast": lambda part: model.encode_batch_fast(part, add_special_tokens=False),
        }
    elif isinstance(tokens, TiktokenTokenizer):
        ranks = tokens._model
        calls = {
            "encode_ordinary_batch": lambda part: ranks.encode_ordinary_batch(part, num_threads=threads),
            "encode_ordinary, one thread": lambda part: [ranks.encode_ordinary(text) for text in part],
        }
    else:
        assert isinstance(tokens, SentencePieceTokenizer)
        pieces = tokens._model
        calls = {
            "encode(batch)": lambda part: pieces.encode(part, num_threads=threads),
            "encode, one thread": lambda part: [pieces.encode(text) for text in part],
        }
    return {label: lambda call=call: _in_parts(call, texts) for label, call in calls.items()}


def _in_parts(call: Callable[[list[str]], object], texts: list[str]) -> None:
    for at in range(0, len(texts), TEXTS_PER_CALL):
        call(texts[at : at + TEXTS_PER_CALL])


def stamp(tokens: Tokenizer) -> dict:
    """Where and with what."""
    library = {"json": "tokenizers", "tiktoken": "tiktoken", "sentencepiece": "sentencepiece"}[tokens.kind]
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": bench.output_of("git", "describe", "--always", "--dirty", "--exclude=*"),
        "machine": bench.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[
            0
        ],  # more than 1 before a run: the machine had other work, and only CPU seconds say much
        "python": platform.python_version(),
        "library": f"{library} {version(library)}",
    }


def _timed(call: Callable[[], None]) -> Mark:
    with _cpu_seconds() as cpu_s:
        begin = time.perf_counter()
        call()
        wall_s = time.perf_counter() - begin
    return Mark(wall_s, cpu_s())


@contextmanager
def _cpu_seconds() -> Iterator[Callable[[], float]]:
    """What this process and those that it started and waited for have computed since."""
    before = _used()
    yield lambda: _used() - before


def _used() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
