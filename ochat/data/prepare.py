"""Prepare a data set: conversations in, token ids with spans and weights out.

    report = prepare(["a.jsonl"], base="models/base", template="openchat_v3.2", output="data/a")

The main process cuts the input into batches of records, workers turn each into token ids and spans (encode.py), and the
main process writes them in input order (store_writer.py). Memory is a few batches per worker and one shard.
"""

from __future__ import annotations

import difflib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ochat import console
from ochat.data import rewards, shown
from ochat.data.encode import Encoded, Encoder, OverLong, encode_all
from ochat.data.inputs import find_inputs, missing_parts
from ochat.data.manifest import TOKEN_WEIGHTS, WEIGHTED_VERSION, describe_file
from ochat.data.readers import RecordFile, batches
from ochat.data.rejected import RejectLog
from ochat.data.scores.rewards import Rewards, read_rewards
from ochat.data.scores.token_file import TokenWeights
from ochat.data.shown import Shown
from ochat.data.store_writer import StoreWriter, publish
from ochat.errors import ConfigError, DataError
from ochat.files import bounded_json
from ochat.text import prefixes, template, tokenizer
from ochat.text.conversation import Conversation, Message
from ochat.text.record_formats import FROM_REWARD, EmptyAnswers, RecordReader
from ochat.text.records import map as record_map
from ochat.text.records.keys import may_be_classes
from ochat.text.records.map import RecordMap
from ochat.text.reward_text import RewardText
from ochat.text.tokenizer import Tokenizer

SMALL_INPUT_BYTES = 8 << 20  # below it, starting processes takes longer than the work
MOST_UNKNOWN = 0.001  # of the letters
MOST_KEYS = 300  # of metadata that are counted each alone: some records have keys that no other has
OTHER_KEYS = "other keys"
HELD_OUT = "-held-out"  # ends the name of the held-out set
COUNTED = {  # name in the counts -> in words
    "kept": "kept",
    "truncated": "truncated",
    "too_long": "too long",
    "unsupervised": "no answer",
    "tokens": "tokens",
    "supervised": "supervised",
}
Counts = Counter[tuple[str, str]]  # (class, a name of COUNTED) -> how many


@dataclass(frozen=True)
class PrepareOptions:
    """Turns conversations into a data set of token ids that `ochat train` reads.

    Weights by class are no part of it: they are applied in training.
    """

    # JSON Lines, JSON (plain or .gz, .bz2, .xz, .zst), Parquet or Arrow files, or folders of them, of which test and
    # validation files are left out; PATH::CLASS gives the records of one input a class
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
    # reward: a record's class is its reward (reward:0, reward:1, ...) by one of --bins, --quantiles and --round-to
    condition_from: Literal["none", "reward"] = "none"
    bins: tuple[float, ...] = ()  # rising edges between the bins of rewards; a reward equal to one is in the upper bin
    quantiles: int = 0  # so many bins of as many records each; the input is read twice
    round_to: float = 0.0  # rewards as numbers, rounded to a multiple of this, say 0.1
    map: str = ""  # a TOML that says which columns are messages, class, reward and weight; --describe writes one
    ignore: tuple[str, ...] = ()  # keys to leave out that would be refused
    empty_answers: EmptyAnswers = "refuse"  # answers of blanks alone teach to say nothing
    # reasoning of assistant messages: as the template writes it, for the last answer alone, for all, or left out
    reasoning: template.ReasoningMode = "template"
    date: str = "2025-01-01"  # what a chat template writes as today's date
    # a file of `ochat score` with a tensor `weights`, one for each supervised token: it multiplies the weight that the
    # token gets in training. Held-out conversations get none
    token_weights: str = ""
    # JSON Lines or Parquet with record_id and reward: these stand in for the records' own rewards
    reward_from: str = ""
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
    counts: Counts
    rejected: int = 0
    elapsed_s: float = 0.0
    skipped: tuple[str, ...] = ()  # files of input folders that hold no records
    held_out: PrepareReport | None = None  # of the held-out set
    ignored: dict[str, int] = field(default_factory=dict)  # metadata keys -> how often they came
    noted: dict[str, int] = field(default_factory=dict)  # what was kept but is worth a look -> conversations
    template_facts: tuple[str, ...] = ()  # what the template writes of itself
    other_splits: tuple[str, ...] = ()  # files of input folders with test or validation data, which were not read
    missing_parts: tuple[str, ...] = ()  # numbered files of which not all are there, in words
    example: Shown | None = None  # the first conversation, and what decodes it
    tokenizer: Tokenizer | None = None

    @cached_property
    def classes(self) -> dict[str, dict[str, int]]:
        """Counts of each class, in the order of the input."""
        names = dict.fromkeys(name for name, _ in self.counts)
        return {name: {column: self.counts[name, column] for column in COUNTED} for name in names}

    @cached_property
    def total(self) -> dict[str, int]:
        """Counts of all classes together."""
        return {column: sum(counts[column] for counts in self.classes.values()) for column in COUNTED}

    def to_dict(self) -> dict[str, Any]:
        """Counts alone, without times and paths: equal input gives an equal manifest."""
        found = self.total | {"rejected": self.rejected, "classes": self.classes}
        optional = {"ignored": self.ignored, "noted": self.noted}
        return found | {name: dict(sorted(values.items())) for name, values in optional.items() if values}


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
    number, of = _check_given(options)
    inputs = find_inputs(options.input)
    files = [RecordFile(path, name) for path, name in zip(inputs.paths, inputs.conditions, strict=True)]
    encoder = _make_encoder(options, files)
    num_bytes, num_workers = sum(file.size for file in files), options.workers
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if num_bytes > SMALL_INPUT_BYTES else 0
    encoded = encode_all(batches(files, number, of), encoder, num_workers)
    output = Path(options.output)
    outputs = [output, output.with_name(output.name + HELD_OUT)] if options.held_out else [output]
    writers = [StoreWriter(path, encoder.tokenizer.vocab_size, overwrite=options.overwrite) for path in outputs]
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        bar = console.bar("prepare, MiB", num_bytes >> 20) if options.progress else nullcontext(lambda _: None)
        with bar as advance:
            counts, notes = _write(options, encoded, writers, advance)
        held_out = PrepareReport(str(outputs[1]), encoder.context, counts[1]) if options.held_out else None
        skipped, elapsed_s = tuple(map(str, inputs.skipped)), time.monotonic() - started
        report = PrepareReport(
            options.output, encoder.context, counts[0], notes.rejected, elapsed_s, skipped, held_out,
            notes.ignored, notes.noted, tuple(encoder.template.facts(encoder.tokenizer)),
            tuple(map(str, inputs.other_splits)), tuple(missing_parts(inputs.paths)), notes.example, encoder.tokenizer,
        )  # fmt: skip
        _check_classes(encoder, report)
        _check_letters(options, notes)
        if of == 1:  # one of many may be empty
            _check_mapped(options.map, encoder.reader.map, notes)
            _check_kept(options, report)
        for writer, each, side in zip(writers, filter(None, (report, held_out)), ("train", "held-out"), strict=False):
            manifest = _manifest(options, encoder, each)
            classes = [*writer.classes, *manifest.get("condition_from", {}).get("names", ())]
            manifest["prefixes"] = (
                {"refused": notes.bound}
                if notes.bound
                else prefixes.describe(encoder.template, encoder.tokenizer, classes)
            )
            manifest |= {"held_out": {"share": options.held_out, "side": side}} if options.held_out else {}
            if encoder.token_weights and side == "train":
                manifest |= {"version": WEIGHTED_VERSION, TOKEN_WEIGHTS: describe_file(encoder.token_weights.path)}
            if of > 1:
                names = [Path(name).name for name in options.input]  # machines may have them in different folders
                manifest["shard"] = {"number": number, "of": of, "input": names}
            encoder.tokenizer.model.save(str(writer.folder / "tokenizer.json"), pretty=False)  # for `ochat show`
            writer.seal(manifest)
        publish(writers)
    return report


def _check_given(options: PrepareOptions) -> tuple[int, int]:
    """The numbers of --shard. Raises ConfigError for what is missing or cannot be."""
    for name in ("input", "base", "template"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is missing: `ochat prepare --help` says what it takes")
    if not 0 <= options.held_out < 1:
        raise ConfigError(f"--held-out {options.held_out}: a share from 0 to 1 is needed, such as 0.05")
    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"--workers {options.workers}: 0 (this process alone) or more")
    if options.context is not None and options.context < 2:
        raise ConfigError(f"--context {options.context}: at least 2 tokens are needed")
    _check_condition_from(options)
    number, _, of = options.shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"--shard {options.shard}: i/n is needed, with i from 1 to n, such as 3/8")
    return int(number), int(of)


def _check_condition_from(options: PrepareOptions) -> None:
    ways = {"--bins": options.bins, "--quantiles": options.quantiles, "--round-to": options.round_to}
    given = [name for name, value in ways.items() if value]
    if options.condition_from == "none":
        if given:
            raise ConfigError(f"{given[0]}: does nothing without {FROM_REWARD}")
        return
    if len(given) != 1:
        raise ConfigError(f"{FROM_REWARD}: one of {', '.join(ways)} is needed, got {' and '.join(given) or 'none'}")
    if options.default_condition:
        raise ConfigError(f"{FROM_REWARD} and --default-condition: every class is a reward's; take one of the two out")
    if list(options.bins) != sorted(set(options.bins)) or not all(map(math.isfinite, options.bins)):
        raise ConfigError(f"--bins {' '.join(map(str, options.bins))}: rising numbers are needed, such as 0.2 0.5")
    if options.quantiles and options.quantiles < 2:
        raise ConfigError(f"--quantiles {options.quantiles}: at least 2 are needed")
    if not (options.round_to >= 0 and math.isfinite(options.round_to)):
        raise ConfigError(f"--round-to {options.round_to}: a number above 0 is needed, such as 0.1")


def _reward_text(
    options: PrepareOptions, reader: RecordReader, files: Sequence[RecordFile], given: Rewards | None
) -> RewardText | None:
    """How rewards become classes; for quantiles all the input is read, also that of other shards."""
    if options.condition_from == "none":
        return None
    if reader.map.condition or reader.map.answers:
        raise ConfigError(f"{FROM_REWARD} and --map {options.map}: both give classes; take condition and answers out")
    edges = options.bins
    if options.quantiles:
        edges = rewards.quantile_edges((records for records, _ in batches(files)), reader, options.quantiles, given)
    return RewardText(edges, options.round_to, reader.attributes)


def _make_encoder(options: PrepareOptions, files: Sequence[RecordFile]) -> Encoder:
    tokens = tokenizer.load(options.base)
    if options.template == "base":
        form = template.of_base(options.base, tokens, options.date, options.context)
    else:
        form = template.with_bos_of(template.load(options.template), tokens)
    form = template.with_reasoning(template.with_conditions(form, options.conditions), options.reasoning)
    form.check(tokens)
    trained_context = _check_base(options.base, tokens)
    context = form.context if options.context is None else options.context
    reader = RecordReader(
        options.format, options.default_condition, record_map.load(options.map) if options.map else RecordMap(),
        frozenset(options.ignore), options.empty_answers, form.attributes,
    )  # fmt: skip
    inputs = [file.name for file in files]
    given = read_rewards(Path(options.reward_from), inputs) if options.reward_from else None
    reader = replace(reader, reward_text=_reward_text(options, reader, files, given))
    return Encoder(
        tokens, form, reader, context, options.over_long, options.held_out, options.conditions == "ignore",
        TokenWeights.open(Path(options.token_weights), inputs) if options.token_weights else None, given,
        trained_context,
    )  # fmt: skip


def _check_base(base: str, tokens: Tokenizer) -> int | None:
    """The base's context in tokens, if it says one. Raises ConfigError if its embedding has too few rows for the
    tokenizer: training would refuse it."""
    path = Path(base) / "config.json"
    if not path.is_file():
        return None
    config = bounded_json.read_object(path, ConfigError, "fetch it again")
    rows, context = config.get("vocab_size"), config.get("max_position_embeddings")
    if isinstance(rows, int) and rows < tokens.vocab_size:
        raise ConfigError(
            f"{base}: its tokenizer has ids up to {tokens.vocab_size - 1}, its embedding {rows} rows; make a base with "
            f"rows for all: ochat init-base --hf {base} OUT"
        )
    return context if isinstance(context, int) else None


@dataclass
class _Notes:
    """What reading found beside conversations."""

    rejected: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    mapped: set[str] = field(default_factory=set)
    letters: int = 0
    unknown_letters: int = 0
    bound: str = ""  # the first record that lets no prefix be exchanged, and why
    example: Shown | None = None  # the first conversation

    def count_ignored(self, found: Counter[str]) -> None:
        """Add counts of metadata keys: of the first MOST_KEYS and of those that may say a class, and of all others
        together."""
        for key, count in found.items():
            is_counted = key in self.ignored or len(self.ignored) < MOST_KEYS or bool(may_be_classes([key]))
            self.ignored[key if is_counted else OTHER_KEYS] += count


def _write(
    options: PrepareOptions,
    batches: Iterable[tuple[Encoded, int]],
    writers: list[StoreWriter],
    advance: Callable[[int], object],
) -> tuple[list[Counts], _Notes]:
    """Everything from records to shards; the counts of each data set, and what else was found."""
    counts: list[Counts] = [Counter() for _ in writers]
    notes, done_mib, rejects = _Notes(), 0, RejectLog(writers[0].folder, options.on_bad)
    for encoded, position in batches:
        rejects.add(encoded.rejects)
        notes.count_ignored(encoded.ignored)
        notes.noted.update(encoded.noted)
        notes.mapped |= encoded.mapped
        notes.letters += encoded.letters
        notes.unknown_letters += encoded.unknown_letters
        notes.bound = notes.bound or encoded.bound
        if notes.example is None and encoded.splits[0].sequences.lines:
            notes.example = shown.first_of(encoded.splits[0].sequences)
        for writer, total, split in zip(writers, counts, encoded.splits, strict=False):
            writer.add(split.sequences)
            total.update(split.counts)
        advance((position >> 20) - done_mib)
        done_mib = position >> 20
    rejects.close()
    notes.rejected = rejects.count
    return counts, notes


def _check_classes(encoder: Encoder, report: PrepareReport) -> None:
    """Raises DataError for two classes that give the same ids, so that training could not tell them apart."""
    if encoder.template.condition_roles == "none":
        return
    known: dict[tuple[int, ...], str] = {}
    plain = replace(encoder.template, default_condition="")
    for name in sorted({name for each in (report, report.held_out) if each for name in each.classes}):
        ids = tuple(plain.encode_prompt(Conversation((Message("user", "x"),), name), encoder.tokenizer))
        if ids in known:
            raise DataError(
                f"condition: the classes {known[ids]!r} and {name!r} give the same token ids, so nothing tells them "
                "apart; rename one"
            )
        known[ids] = name


def _check_mapped(path: str, columns: RecordMap, notes: _Notes) -> None:
    """Raises ConfigError for a column of the map that no record has: its weights, say, would be lost."""
    for name in sorted(columns.named() - notes.mapped):
        close = "".join(f"; did you mean {key!r}?" for key in difflib.get_close_matches(name, notes.ignored, n=1))
        raise ConfigError(f"{path}: no record has the column {name!r}, which the map names{close}")


def _check_letters(options: PrepareOptions, notes: _Notes) -> None:
    """Raises DataError if the tokenizer loses more than MOST_UNKNOWN of the text."""
    if notes.unknown_letters > MOST_UNKNOWN * notes.letters:
        raise DataError(
            f"{options.base}: the tokenizer does not know {notes.unknown_letters:,} of {notes.letters:,} letters "
            f"({notes.unknown_letters / notes.letters:.1%}, more than {MOST_UNKNOWN:.1%}): is it the base's? "
            "If so, the base cannot learn this text"
        )


def _check_kept(options: PrepareOptions, report: PrepareReport) -> None:
    """Raises DataError if nothing is left."""
    if not report.total["kept"]:
        why = [f"{report.total[name]} dropped ({COUNTED[name]})" for name in ("too_long", "unsupervised")]
        held_out = [f"{report.held_out.total['kept']} held out"] if report.held_out else []
        what = ", ".join([*why, f"{report.rejected} rejected", *held_out])
        raise DataError(f"{', '.join(options.input)}: no conversation is left to train on; {what}")
    if report.held_out and not report.held_out.total["kept"]:
        kept = report.total["kept"]
        raise DataError(f"--held-out {options.held_out} holds out none of {kept} conversations: raise it")


def _manifest(options: PrepareOptions, encoder: Encoder, report: PrepareReport) -> dict[str, Any]:
    tokens = encoder.tokenizer
    return {
        "template": replace(encoder.template, context=encoder.context).to_dict(),
        "conditions": options.conditions,
        "context": encoder.context,
        "over_long": options.over_long,
        "tokenizer": {"kind": tokens.kind, "fingerprint": tokens.fingerprint(), "vocab_size": tokens.vocab_size},
        "counts": report.to_dict(),
    } | ({"condition_from": encoder.reader.reward_text.to_dict()} if encoder.reader.reward_text else {})
