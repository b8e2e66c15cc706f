"""`ochat eval MODEL DATA`: held-out answers under every class's prefix, and what that says; answers to prompts.

ochat eval runs/mine data/train-held-out --output swap.json
ochat eval models/mine chats.jsonl --prompts prompts.jsonl --conditions GPT4 GPT3 --answers answers.jsonl
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from ochat.console import bar, next_command
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.overrides import at_least
from ochat.run import layout

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalOptions:
    """Measures held-out answers under each class's prefix, and answers prompts.

    Ends with what the numbers mean. Those of a run or its export also go to RUN/swap.json.
    """

    model: Path  # an exported folder, a run (its newest checkpoint) or a checkpoint
    # a prepared data set, several (the shards of one input), or conversations in files as `ochat prepare` reads them
    data: tuple[Path, ...]
    # classes whose prefixes are tried and that answer prompts; left out: those of the data; "": no class
    conditions: tuple[str, ...] = ()
    only_class: str | None = None  # measure the answers of this class alone
    limit: int | None = None  # measure the first so many conversations of each class; left out: all
    template: str | None = None  # of a model without openchat.json: a template's name or file
    output: Path | None = None  # write the numbers to this JSON file too
    prompts: Path | None = (
        None  # a file of prompts to be answered: .txt, one a line; or {"prompt": "..."} or conversations
    )
    answers: Path | None = None  # the JSON Lines file that the answers go to; needed with --prompts
    max_new_tokens: int = 512  # the longest answer to a prompt, in tokens
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base is now; empty: where the run had it


def main(options: EvalOptions) -> None:
    """The command `ochat eval`."""
    from ochat.evaluate import swap  # torch takes seconds to import; --help does without

    record = evaluate(options)
    console = Console(highlight=False)
    console.print(swap.swap_table(record["classes"], record["conditions"]))
    for path in filter(None, (options.output, options.answers, place_in_run(options.model))):
        console.print(escape(f"wrote {path}"), soft_wrap=True)
    console.print(f"\n[bold]{escape(record['verdict'])}[/]")
    run = layout.run_of(options.model)
    next_command(*(("ochat report", run) if run else ("ochat chat", options.model)))


def place_in_run(model: Path) -> Path | None:
    """RUN/swap.json where `model` is a run or its export; None for another model, and for a run that is read-only."""
    run = layout.run_of(model)
    return run / layout.SWAP if run and os.access(run, os.W_OK) else None


def evaluate(options: EvalOptions) -> dict[str, Any]:
    """The content of --output and of RUN/swap.json, after they and the answers are written: model, data, conditions,
    how intervals are made, `classes` (swap.summarise) and `verdict` (its words).

    Raises: ConfigError, DataError and CheckpointError; before the model is loaded for all that can be known by then.
    """
    from ochat.data.dataset import shown_paths
    from ochat.evaluate import held_out, intervals, prompts, swap, verdict
    from ochat.export.open_model import folder_of, open_model, stop_ids
    from ochat.model.config import ModelConfig
    from ochat.model.device import find_device
    from ochat.text import tokenizer as tokenizers
    from ochat.text.openchat_json import known_classes, warn_of_unknown_class

    if not options.data:
        raise ConfigError("DATA is missing: name a prepared data set, or files of conversations, after MODEL")
    device = find_device(options.device)
    if (options.prompts is None) != (options.answers is None):
        raise ConfigError("--prompts FILE and --answers FILE go together: give both, or neither")
    at_least(options, max_new_tokens=1, limit=1)
    atomic.check_writable(options.output, options.answers)
    folder = folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = held_out.choose_template(options.data, folder, options.template, tokenizer)
    everything = held_out.read_held_out(options.data, template, tokenizer)
    conditions = held_out.choose_conditions(options.conditions, everything, template, tokenizer)
    for condition in conditions:
        warn_of_unknown_class(condition, known_classes(folder))
    conversations = held_out.select(everything, options.only_class, options.limit)
    context = ModelConfig.load(folder).max_position_embeddings
    read = prompts.read_conversations(options.prompts) if options.prompts else ()
    asked = prompts.encode(read, conditions, template, tokenizer, context)
    model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
    with bar("conversations", len(conversations) * len(conditions)) as advance:
        sums = swap.swap_matrix(model, template, tokenizer, conversations, conditions, advance)
    classes = swap.summarise(sums, conditions)
    record = {
        "model": str(folder),
        "data": shown_paths(options.data),
        "template": template.name,
        "dtype": options.dtype,
        "conditions": list(conditions),
        "interval": {"level": intervals.LEVEL, "method": swap.METHOD, "resamples": swap.RESAMPLES},
        "classes": classes,
        "verdict": verdict.verdict(classes, template.default_condition),
    }
    kept = place_in_run(options.model)
    for path in filter(None, (options.output, kept)):
        atomic.write_json(path, record)
    if kept is None and layout.run_of(options.model):
        log.warning("%s: its run is read-only and does not keep these numbers", options.model)
    if options.answers:
        ends = stop_ids(folder, template, tokenizer)
        answered = prompts.answer(asked, model, tokenizer, ends, options.max_new_tokens)
        prompts.write_answers(options.answers, answered, len(asked))
    return record
