"""Conversations in, a data set of token ids out: what `ochat prepare --input ... --output DIR` runs.

    report = prepare(["a.jsonl"], base="models/base", template="openchat_v3.2", output="data/a")

The main process cuts the input into batches of records, workers turn each into token ids and spans (encode.py), and
the main process writes shards in input order. Memory is a few batches per worker and one shard.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ochat.data import records, template, tokenizer
from ochat.data.encode import Encoded, Encoder, OverLong, Reject
from ochat.data.prepare_report import PrepareReport, print_report
from ochat.data.records import Record, RecordFile
from ochat.data.shards import ShardWriter
from ochat.data.weights import ROLES
from ochat.errors import ConfigError, DataError

BATCH_RECORDS, BATCH_BYTES = 512, 1 << 20
SMALL_INPUT_BYTES = 8 << 20  # below it, starting processes takes longer than the work
REJECTS = "rejects.jsonl"
Batch = tuple[list[Record], int]  # records, and the bytes of all files read by then


@dataclass(frozen=True)
class PrepareOptions:
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    input: tuple[str, ...]  # JSON Lines or JSON files, plain or compressed (.gz, .xz, .zst); at least one
    base: str  # folder of the base model, or a tokenizer's file
    template: str  # a built-in template's name, or the path of a .toml
    output: str  # folder of the data set
    # of the records; auto: told by each record's keys
    format: Literal["auto", "openchat", "messages", "sharegpt", "alpaca"] = "auto"
    on_bad: Literal["error", "skip"] = "error"  # a bad record stops everything, or goes to OUTPUT/rejects.jsonl
    over_long: OverLong = "truncate"  # what becomes of a conversation longer than the context
    context: int | None = None  # tokens a conversation may have; left out: the template's
    conditions: Literal["both", "assistant", "ignore"] = "both"  # which roles' prefixes carry the condition
    default_condition: str = ""  # the class of records that name none
    # processes that tokenise; 0: this one alone; left out: one per core, or this one alone for a small input
    workers: int | None = None
    overwrite: bool = False  # replace a data set that is at OUTPUT
    progress: bool = True  # show a progress bar


def prepare(
    inputs: Sequence[str | Path], base: str | Path, template: str, output: str | Path, **options
) -> PrepareReport:
    """Prepare `inputs` as PrepareOptions (whose other fields are keywords here) say.

    Raises DataError for a bad record ("file:line: field: what is wrong") unless on_bad="skip", for empty input and
    where nothing is left to train on; ConfigError for a tokenizer without the template's tokens and for an output
    that is in the way.
    """
    return run(PrepareOptions(tuple(map(str, inputs)), str(base), template, str(output), **options))


def main(options: PrepareOptions) -> None:
    """The command: prepare, then print the counts."""
    print_report(run(options))


def run(options: PrepareOptions) -> PrepareReport:
    """Prepare, and return the counts."""
    started = time.monotonic()
    files = _open(options)
    encoder = _encoder(options)
    counts: dict[str, Counter[str]] = {}
    num_rejected = 0
    with ShardWriter(Path(options.output), encoder.tokenizer.vocab_size, overwrite=options.overwrite) as writer:
        with _Rejects(writer.folder, options.on_bad) as rejects, _Bar(files, options.progress) as bar:
            for encoded, position in _encode_all(_batches(files), encoder, _num_workers(options, files)):
                num_rejected += rejects.add(encoded.rejects)
                writer.add(encoded.columns)
                for name, count in encoded.counts.items():
                    counts.setdefault(name, Counter()).update(count)
                bar(position)
        report = PrepareReport(options.output, encoder.context, counts, num_rejected, time.monotonic() - started)
        if not report.kept:
            raise DataError(f"{', '.join(options.input)}: no conversation is left to train on; {report.summary()}")
        writer.finish(_manifest(options, encoder, report), ROLES)
    return report


def _encoder(options: PrepareOptions) -> Encoder:
    if options.context is not None and options.context < 2:
        raise ConfigError(f"--context {options.context}: at least 2 tokens are needed")
    tokens = tokenizer.load(options.base)
    form = template.with_conditions(template.load(options.template), options.conditions)
    form.check(tokens)
    context = form.context if options.context is None else options.context
    return Encoder(tokens, form, options.format, options.default_condition, context, options.over_long)


def _open(options: PrepareOptions) -> list[RecordFile]:
    if not options.input:
        raise ConfigError("no input: give at least one file with --input")
    return [records.read(path) for path in options.input]


def _num_workers(options: PrepareOptions, files: list[RecordFile]) -> int:
    if options.workers is not None:
        if options.workers < 0:
            raise ConfigError(f"--workers {options.workers}: 0 (this process alone) or more")
        return options.workers
    return len(os.sched_getaffinity(0)) if sum(file.size for file in files) > SMALL_INPUT_BYTES else 0


def _batches(files: list[RecordFile]) -> Iterator[Batch]:
    """Records of all files in order, in batches that are worth a message to another process."""
    batch: list[Record] = []
    num_bytes = done = 0
    for file in files:
        for record in file:
            batch.append(record)
            num_bytes += len(record.data)
            if len(batch) == BATCH_RECORDS or num_bytes >= BATCH_BYTES:
                yield batch, done + file.position
                batch, num_bytes = [], 0
        done += file.size
    if batch:
        yield batch, done


def _encode_all(batches: Iterable[Batch], encoder: Encoder, num_workers: int) -> Iterator[tuple[Encoded, int]]:
    """Encoded batches in the order of their records."""
    if num_workers == 0:
        for batch, position in batches:
            yield encoder(batch), position
        return
    # spawn: a fork would copy the locks of this process's threads in whatever state they are
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, spawn, _start_worker, (encoder,))
    waiting: deque[tuple[Future[Encoded], Batch]] = deque()
    try:
        for batch in batches:
            waiting.append((pool.submit(_encode, batch[0]), batch))
            if len(waiting) > 3 * num_workers:  # enough to keep everybody busy, few enough to stay small
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Encoded], batch: Batch) -> tuple[Encoded, int]:
    try:
        return future.result(), batch[1]
    except BrokenProcessPool as error:
        first = batch[0][0]
        raise DataError(
            f"{first.place}: a worker died on this record or one of the {len(batch[0]) - 1} behind it, most often for "
            "want of memory: try --workers 0, which needs the least"
        ) from error


_worker_encoder: Callable[[list[Record]], Encoded]


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder  # a worker process has one encoder, and pickling it per batch would cost more than the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is enough
    _worker_encoder = encoder


def _encode(batch: list[Record]) -> Encoded:
    return _worker_encoder(batch)


class _Rejects:
    """Bad records: the first one raises, or all are written down with their reasons."""

    def __init__(self, folder: Path, on_bad: str) -> None:
        self.path, self.stop = folder / REJECTS, on_bad == "error"
        self.file: IO[str] | None = None

    def __enter__(self) -> _Rejects:
        self.file = None if self.stop else self.path.open("w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, rejects: list[Reject]) -> int:
        """Number of `rejects`. Raises DataError for the first if none may be."""
        if rejects and self.file is None:
            first = rejects[0]
            raise DataError(f"{first.file}:{first.line}: {first.reason} (--on-bad skip goes on without bad records)")
        for reject in rejects:
            assert self.file is not None
            self.file.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
        return len(rejects)


class _Bar:
    """Progress by bytes read."""

    def __init__(self, files: list[RecordFile], shown: bool) -> None:
        columns = (TextColumn("prepare"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, disable=not shown)
        self.task = self.progress.add_task("prepare", total=sum(file.size for file in files))

    def __enter__(self) -> Callable[[int], None]:
        self.progress.start()
        return lambda position: self.progress.update(self.task, completed=position)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _manifest(options: PrepareOptions, encoder: Encoder, report: PrepareReport) -> dict:
    tokens = encoder.tokenizer
    return {
        "template": replace(encoder.template, context=encoder.context).to_dict(),
        "conditions": options.conditions,
        "context": encoder.context,
        "over_long": options.over_long,
        "tokenizer": {"kind": tokens.kind, "fingerprint": tokens.fingerprint(), "vocab_size": tokens.vocab_size},
        "counts": report.to_dict(),
    }
