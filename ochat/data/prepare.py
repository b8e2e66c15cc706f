"""Conversations in, a data set of token ids out: what `ochat prepare --input ... --output DIR` runs.

    report = prepare(["a.jsonl"], base="models/base", template="openchat_v3.2", output="data/a")

The main process cuts the input into batches of records, workers turn each into token ids and spans (encode.py), and
the main process writes shards in input order. Memory is a few batches per worker and one shard.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ochat.data import (
    input_files,
)
from ochat.data.encode import Encoder, OverLong
from ochat.data.prepare_report import Bar, Counts, PrepareReport, add_counts
from ochat.data.records import Record, RecordFile
from ochat.data.rejects import Rejects
from ochat.data.store_writer import StoreWriter, publish
from ochat.data.workers import Batch, encode_all
from ochat.errors import ConfigError, DataError
from ochat.text import template, tokenizer

BATCH_RECORDS, BATCH_BYTES = 512, 1 << 20
SMALL_INPUT_BYTES = 8 << 20  # below it, starting processes takes longer than the work
HELD_OUT = "-held-out"  # what the name of the held-out set ends with


@dataclass(frozen=True)
class PrepareOptions:
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    # JSON Lines, JSON (either plain, .gz, .xz, .zst) or Parquet files, or folders of them; at least one
    input: tuple[str, ...] = ()
    base: str = ""  # folder of the base model, or a tokenizer's file; needed to prepare
    template: str = ""  # a built-in template's name, or the path of a .toml; needed to prepare
    output: str = ""  # folder of the data set; needed to prepare
    # of the records; auto: told by each record's keys
    format: Literal["auto", "openchat", "messages", "sharegpt", "alpaca"] = "auto"
    on_bad: Literal["error", "skip"] = "error"  # a bad record stops everything, or goes to OUTPUT/rejects.jsonl
    over_long: OverLong = "truncate"  # what becomes of a conversation longer than the context
    context: int | None = None  # tokens a conversation may have; left out: the template's
    conditions: Literal["both", "assistant", "ignore"] = "both"  # which roles' prefixes carry the condition
    default_condition: str = ""  # the class of records that name none
    # share of the prompts (say 0.05) whose conversations go to OUTPUT-held-out instead, for evaluation; all answers to
    # one prompt (system text and first user message) stay together, on every machine and in every order
    held_out: float = 0.0
    # i/n: take only every n-th record, from the i-th on. On 8 machines: the same command with 1/8 ... 8/8, each with an
    # --output of its own; then train with all of them: data.path = ["data/1", ..., "data/8"]
    shard: str = "1/1"
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


def run(options: PrepareOptions) -> PrepareReport:
    """Prepare, and return the counts."""
    started = time.monotonic()
    _check_given(options)
    shard = Shard.parse(options.shard)
    inputs = input_files.find(options.input)
    files = [input_files.read_records(path) for path in inputs.paths]
    encoder = _encoder(options)
    with ExitStack() as stack:
        writers = [stack.enter_context(writer) for writer in _writers(options, encoder.tokenizer.vocab_size)]
        sides, num_rejected = _write(options, files, encoder, writers, shard)
        skipped, elapsed_s = tuple(map(str, inputs.skipped)), time.monotonic() - started
        reports = [PrepareReport(str(writer.output), encoder.context, counts, 0, elapsed_s)
                   for writer, counts in zip(writers, sides, strict=True)]  # fmt: skip
        report = replace(reports[0], rejected=num_rejected, skipped=skipped, held_out=(*reports, None)[1])
        _check_kept(options, report, shard)
        for side, writer in enumerate(writers):
            writer.seal(_manifest(options, encoder, shard, report if side == 0 else reports[side], side))
        publish(writers)
    return report


def _check_given(options: PrepareOptions) -> None:
    for name in ("input", "base", "template"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing: `ochat prepare --help` says what it takes")
    if not 0 <= options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out}: a share from 0 to 1 is needed, such as 0.05")


def _writers(options: PrepareOptions, vocab_size: int) -> list[StoreWriter]:
    """Of the data set, and of the held-out one."""
    output = Path(options.output)
    outputs = [output] if not options.held_out else [output, output.with_name(output.name + HELD_OUT)]
    return [StoreWriter(path, vocab_size, overwrite=options.overwrite) for path in outputs]


def _write(
    options: PrepareOptions, files: list[RecordFile], encoder: Encoder, writers: list[StoreWriter], shard: Shard
) -> tuple[list[Counts], int]:
    """Everything from records to shards; the counts of each side, and the number of rejects."""
    sides: list[Counts] = [{} for _ in writers]
    num_rejected = 0
    with Rejects(writers[0].folder, options.on_bad) as rejects, Bar(files, options.progress) as bar:
        for encoded, position in encode_all(_batches(files, shard), encoder, _num_workers(options, files)):
            num_rejected += rejects.add(encoded.rejects)
            for side, writer in enumerate(writers):
                writer.add(encoded.sides[side].sequences)
                add_counts(sides[side], encoded.sides[side].counts)
            bar(position)
    return sides, num_rejected


def _check_kept(options: PrepareOptions, report: PrepareReport, shard: Shard) -> None:
    """Raises DataError where nothing is left; one of many shards may be empty."""
    if shard.of > 1:
        return
    if not report.kept:
        raise DataError(f"{', '.join(options.input)}: no conversation is left to train on; {report.summary()}")
    if report.held_out and not report.held_out.kept:
        raise DataError(f"--held-out {options.held_out} holds out none of {report.kept} conversations: raise it")


def _encoder(options: PrepareOptions) -> Encoder:
    if options.context is not None and options.context < 2:
        raise ConfigError(f"--context {options.context}: at least 2 tokens are needed")
    tokens = tokenizer.load(options.base)
    form = template.with_conditions(template.load(options.template), options.conditions)
    form.check(tokens)
    context = form.context if options.context is None else options.context
    values = (options.format, options.default_condition, context, options.over_long, options.held_out)
    return Encoder(tokens, form, *values)


@dataclass(frozen=True)
class Shard:
    """Of every `of` records the `number`-th, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Raises ConfigError unless `text` is "i/n"."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"--shard {text}: i/n is needed, with i from 1 to n, such as 3/8")
        return cls(int(number), int(of))


def _num_workers(options: PrepareOptions, files: list[RecordFile]) -> int:
    if options.workers is not None:
        if options.workers < 0:
            raise ConfigError(f"--workers {options.workers}: 0 (this process alone) or more")
        return options.workers
    return len(os.sched_getaffinity(0)) if sum(file.size for file in files) > SMALL_INPUT_BYTES else 0


def _batches(files: list[RecordFile], shard: Shard) -> Iterator[Batch]:
    """The shard's records of all files in order, in batches that are worth a message to another process."""
    batch: list[Record] = []
    num_bytes = done = 0
    number = itertools.cycle(range(1, shard.of + 1))
    for file in files:
        for record in file:
            if next(number) != shard.number:
                continue
            batch.append(record)
            num_bytes += len(record.data)
            if len(batch) == BATCH_RECORDS or num_bytes >= BATCH_BYTES:
                yield batch, done + file.position
                batch, num_bytes = [], 0
        done += file.size
    if batch:
        yield batch, done


def _manifest(options: PrepareOptions, encoder: Encoder, shard: Shard, report: PrepareReport, side: int) -> dict:
    tokens = encoder.tokenizer
    manifest = {
        "template": replace(encoder.template, context=encoder.context).to_dict(),
        "conditions": options.conditions,
        "context": encoder.context,
        "over_long": options.over_long,
        "tokenizer": {"kind": tokens.kind, "fingerprint": tokens.fingerprint(), "vocab_size": tokens.vocab_size},
        "counts": report.to_dict(),
    }
    if options.held_out:
        manifest["held_out"] = {"share": options.held_out, "side": ("train", "held-out")[side]}
    if shard.of > 1:
        names = [Path(name).name for name in options.input]  # machines may have them in different folders
        manifest["shard"] = {"number": shard.number, "of": shard.of, "input": names}
    return manifest
