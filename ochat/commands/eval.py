"""`ochat eval MODEL DATA`: held-out answers under every class's prefix, and answers to prompts under chosen classes.

ochat eval runs/mine data/train-held-out --output swap.json
ochat eval models/mine chats.jsonl --prompts prompts.jsonl --conditions GPT4 GPT3 --answers answers.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape

from ochat.console import bar
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.model.device import find_device
from ochat.text import tokenizer as tokenizers
from ochat.text.openchat_json import load_template, read_description, warn_of_unknown_class
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ochat.evaluate.held_out import HeldOut


@dataclass(frozen=True)
class EvalOptions:
    """Measures held-out answers under each class's prefix, and answers prompts."""

    model: Path  # an exported folder, a run (its newest checkpoint) or a checkpoint
    data: Path  # a prepared data set, or a file or folder of conversations as `ochat prepare` reads them
    # classes whose prefixes are tried and that answer prompts; left out: those of the data; "": no class
    conditions: tuple[str, ...] = ()
    only_class: str | None = None  # measure the answers of this class alone
    limit: int | None = None  # measure the first so many conversations of each class; left out: all
    template: str | None = None  # of a model without openchat.json: a template's name or file
    output: Path | None = None  # write the numbers to this JSON file too
    prompts: Path | None = None  # a file of prompts, {"prompt": "..."} or conversations, to be answered
    answers: Path | None = None  # the JSON Lines file that the answers go to; needed with --prompts
    max_new_tokens: int = 512  # the longest answer to a prompt, in tokens
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a card if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base lies now; empty: where the run had it


def main(options: EvalOptions) -> None:
    """The command `ochat eval`."""
    from ochat.evaluate import matrix

    record = evaluate(options)
    console = Console(highlight=False)
    console.print(matrix.table(record["classes"], record["conditions"]))
    for path in filter(None, (options.output, options.answers)):
        console.print(escape(f"wrote {path}"), soft_wrap=True)


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """What --output holds, after it and the answers are written: model, data, conditions, how intervals were made, and
    `classes` (matrix.summarise).

    Raises: ConfigError, DataError and CheckpointError, for what can be known beforehand before the model is loaded.
    """
    from ochat.evaluate import held_out, matrix, prompts, swap  # torch takes seconds to import; --help should not
    from ochat.export.open_model import folder_of, open_model
    from ochat.model.config import ModelConfig

    device = find_device(options.device)
    _check_files(options)
    folder = folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = _template(options, folder, tokenizer)
    everything = held_out.read(options.data, template, tokenizer)
    conditions = _conditions(options, everything, template, tokenizer)
    for condition in conditions:
        warn_of_unknown_class(condition, read_description(folder).get("classes"))
    conversations = held_out.select(everything, options.only_class, options.limit)
    asked = prompts.read(options.prompts, conditions) if options.prompts else []
    encoded = prompts.encode(asked, template, tokenizer, ModelConfig.load(folder).max_position_embeddings)
    model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
    with bar("conversations", len(conversations) * len(conditions)) as advance:
        sums = swap.swap_matrix(model, template, tokenizer, conversations, conditions, advance)
    record = {
        "model": str(folder),
        "data": str(options.data),
        "template": template.name,
        "dtype": options.dtype,
        "conditions": list(conditions),
        "interval": {"level": matrix.LEVEL, "method": matrix.METHOD, "resamples": matrix.RESAMPLES},
        "classes": matrix.summarise(sums, conditions),
    }
    if options.output:
        atomic.write_json(options.output, record)
    if options.answers:
        found = prompts.answers(model, asked, encoded, template.eot, tokenizer, options.max_new_tokens)
        _write_lines(options.answers, found, len(asked))
    return record


def _check_files(options: EvalOptions) -> None:
    if (options.prompts is None) != (options.answers is None):
        raise ConfigError("--prompts FILE and --answers FILE go together: give both, or neither")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {options.max_new_tokens}: at least 1 is needed")
    atomic.check_places(options.output, options.answers)


def _template(options: EvalOptions, folder: Path, tokenizer: Tokenizer) -> Template:
    """Of a prepared data set its own, which must be the model's too; else the model's, or the one asked for."""
    from ochat.evaluate import held_out

    if not held_out.is_prepared(options.data):
        template = load_template(folder, options.template)
    elif options.template is not None:
        raise ConfigError(f"--template {options.template}: {options.data} is prepared, and has its own; leave it out")
    else:
        spoken = load_template(folder, None) if read_description(folder) else None
        template = held_out.template_of(options.data, spoken, tokenizer)
    template.check(tokenizer)
    return template


def _conditions(
    options: EvalOptions, conversations: Sequence[HeldOut], template: Template, tokenizer: Tokenizer
) -> tuple[str, ...]:
    """Those asked for, or the data's classes; one empty one for a template whose prefixes name no class."""
    if template.condition_roles == "none":
        if any(options.conditions):
            raise ConfigError(f"--conditions: the template {template.name} has none in its prefixes; leave it out")
        return ("",)
    conditions = tuple(dict.fromkeys(options.conditions or sorted({each.condition for each in conversations})))
    for condition in conditions:
        if condition and len(tokenizer.split_at_specials(condition)) > 1:
            raise ConfigError(f"the class {condition!r} spells a special token; no prefix can carry it")
    return conditions


def _write_lines(path: Path, lines: Iterator[dict[str, Any]], total: int) -> None:
    """Each line stands in the file as soon as it is known: answers take long."""
    with path.open("w", encoding="utf-8", newline="") as file, bar("answers", total) as advance:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
            advance(1)
