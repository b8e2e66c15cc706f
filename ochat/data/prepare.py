"""Prepare a data set: conversations in, token ids with spans and weights out.

    report = prepare(["a.jsonl"], base="models/base", template="openchat_v3.2", output="data/a")

The main process cuts the input into batches of records, workers turn each into token ids and spans (encode.py), and the
main process writes them in input order (store_writer.py). Memory is a few batches per worker and one shard.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ochat import console
from ochat.data.encode import Encoder, OverLong
from ochat.data.readers import RecordFile, find_inputs
from ochat.data.rejected import RejectLog
from ochat.data.store_writer import StoreWriter, publish
from ochat.data.workers import InputShare, batches, encode_all
from ochat.errors import ConfigError, DataError
from ochat.text import template, tokenizer

SMALL_INPUT_BYTES = 8 << 20  # below it, starting processes takes longer than the work
HELD_OUT = "-held-out"  # ends the name of the held-out set
COUNTED = {  # name in the counts -> in words
    "kept": "kept",
    "truncated": "truncated",
    "too_long": "too long",
    "unsupervised": "no answer",
    "tokens": "tokens",
    "supervised": "supervised",
}
Counts = dict[str, Counter[str]]  # class -> counts by the names of COUNTED


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
    # of the records; auto: recognised by each record's keys
    format: Literal["auto", "openchat", "messages", "sharegpt", "alpaca"] = "auto"
    on_bad: Literal["error", "skip"] = "error"  # a bad record stops everything, or is written to OUTPUT/rejects.jsonl
    over_long: OverLong = "truncate"  # what to do with a conversation longer than the context
    context: int | None = None  # most tokens of a conversation; default: the template's
    conditions: Literal["both", "assistant", "ignore"] = "both"  # which roles' prefixes carry the condition
    default_condition: str = ""  # the class of records that name none
    # share of the prompts (say 0.05) whose conversations go to OUTPUT-held-out instead, for evaluation; all answers to
    # one prompt (system text and first user message) stay together, on every machine and in every order
    held_out: float = 0.0
    # i/n: take only every n-th record, from the i-th on. On 8 machines: the same command with 1/8 ... 8/8, each with
    # its own --output; then train with all of them: data.path = ["data/1", ..., "data/8"]
    shard: str = "1/1"
    # processes that tokenise; 0: only this one; default: one per core, or only this one for a small input
    workers: int | None = None
    overwrite: bool = False  # replace a data set that is at OUTPUT
    progress: bool = True  # show a progress bar


@dataclass(frozen=True)
class PrepareReport:
    """Counts of one run; tokens are those that were kept."""

    output: str
    context: int
    classes: Counts
    rejected: int
    elapsed_s: float
    skipped: tuple[str, ...] = ()  # files of input folders that were not read
    held_out: PrepareReport | None = None  # of the held-out set

    @cached_property
    def total(self) -> Counter[str]:
        """Counts of all classes together."""
        return sum(self.classes.values(), Counter())

    def to_dict(self) -> dict[str, Any]:
        """Counts alone, without times and paths: equal input gives an equal manifest."""
        classes = {name: {column: counts[column] for column in COUNTED} for name, counts in self.classes.items()}
        return {column: self.total[column] for column in COUNTED} | {"rejected": self.rejected, "classes": classes}

    def summary(self) -> str:
        """One line."""
        dropped = ", ".join(
            f"{self.total[name]} dropped ({COUNTED[name]})" for name in ("too_long", "unsupervised") if self.total[name]
        )
        kept = f"{self.total['kept']} kept, {self.total['truncated']} of them truncated"
        return f"{kept}, {dropped or 'none dropped'}, {self.rejected} rejected"


def prepare(
    inputs: Sequence[str | Path], base: str | Path, template: str, output: str | Path, **options: Any
) -> PrepareReport:
    """Prepare `inputs` as PrepareOptions (whose other fields are keywords here) say.

    Raises DataError for a bad record ("file:line: field: what is wrong") unless on_bad="skip", for empty input and
    if nothing is left to train on; ConfigError for a tokenizer without the template's tokens and for an output that
    exists.
    """
    return run(PrepareOptions(tuple(map(str, inputs)), str(base), template, str(output), **options))


def run(options: PrepareOptions) -> PrepareReport:
    """Prepare, and return the counts."""
    started = time.monotonic()
    _check_given(options)
    share = InputShare.parse(options.shard)
    inputs = find_inputs(options.input)
    files = [RecordFile(path) for path in inputs.paths]
    encoder = _make_encoder(options)
    with ExitStack() as stack:
        writers = [stack.enter_context(writer) for writer in _make_writers(options, encoder.tokenizer.vocab_size)]
        counts, num_rejected = _write(options, files, encoder, writers, share)
        elapsed_s = time.monotonic() - started
        reports = [PrepareReport(str(writer.output), encoder.context, each, 0, elapsed_s)
                   for writer, each in zip(writers, counts, strict=True)]  # fmt: skip
        skipped = tuple(map(str, inputs.skipped))
        report = replace(reports[0], rejected=num_rejected, skipped=skipped, held_out=(*reports, None)[1])
        if share.of == 1:  # one of many may be empty
            _check_kept(options, report)
        for writer, each, side in zip(writers, (report, *reports[1:]), ("train", "held-out"), strict=False):
            writer.seal(_manifest(options, encoder, share, each, side))
        publish(writers)
    return report


def _check_given(options: PrepareOptions) -> None:
    for name in ("input", "base", "template"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing: `ochat prepare --help` says what it takes")
    if not 0 <= options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out}: a share from 0 to 1 is needed, such as 0.05")
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers {options.workers}: 0 (this process alone) or more")
    if options.context is not None and options.context < 2:
        raise ConfigError(f"--context {options.context}: at least 2 tokens are needed")


def _make_encoder(options: PrepareOptions) -> Encoder:
    tokens = tokenizer.load(options.base)
    form = template.with_conditions(template.load(options.template), options.conditions)
    form.check(tokens)
    context = form.context if options.context is None else options.context
    values = (options.format, options.default_condition, context, options.over_long, options.held_out)
    return Encoder(tokens, form, *values)


def _make_writers(options: PrepareOptions, vocab_size: int) -> list[StoreWriter]:
    """Of the data set, and of the held-out one."""
    output = Path(options.output)
    outputs = [output] if not options.held_out else [output, output.with_name(output.name + HELD_OUT)]
    return [StoreWriter(path, vocab_size, overwrite=options.overwrite) for path in outputs]


def _write(
    options: PrepareOptions, files: list[RecordFile], encoder: Encoder, writers: list[StoreWriter], share: InputShare
) -> tuple[list[Counts], int]:
    """Everything from records to shards; the counts of each data set, and the number of rejects."""
    counts: list[Counts] = [{} for _ in writers]
    num_bytes, done_mib = sum(file.size for file in files), 0
    num_workers = options.workers
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if num_bytes > SMALL_INPUT_BYTES else 0
    bar = console.bar("prepare, MiB", num_bytes >> 20) if options.progress else nullcontext(None)
    with RejectLog(writers[0].folder, options.on_bad) as rejects, bar as advance:
        for encoded, position in encode_all(batches(files, share), encoder, num_workers):
            rejects.add(encoded.rejects)
            for writer, total, split in zip(writers, counts, encoded.splits, strict=False):
                writer.add(split.sequences)
                _add_counts(total, split.counts)
            if advance is not None:
                advance((position >> 20) - done_mib)
                done_mib = position >> 20
    return counts, rejects.count


def _add_counts(total: Counts, more: Mapping[str, Counter[str]]) -> None:
    for name, count in more.items():
        total.setdefault(name, Counter()).update(count)


def _check_kept(options: PrepareOptions, report: PrepareReport) -> None:
    """Raises DataError if nothing is left."""
    if not report.total["kept"]:
        raise DataError(f"{', '.join(options.input)}: no conversation is left to train on; {report.summary()}")
    if report.held_out and not report.held_out.total["kept"]:
        kept = report.total["kept"]
        raise DataError(f"--held-out {options.held_out} holds out none of {kept} conversations: raise it")


def _manifest(options: PrepareOptions, encoder: Encoder, share: InputShare, report: PrepareReport, side: str) -> dict:
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
        manifest["held_out"] = {"share": options.held_out, "side": side}
    if share.of > 1:
        names = [Path(name).name for name in options.input]  # machines may have them in different folders
        manifest["shard"] = {"number": share.number, "of": share.of, "input": names}
    return manifest
