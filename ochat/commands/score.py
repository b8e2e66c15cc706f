"""`ochat score MODEL DATA OUT`: what a model thinks of every supervised token, under chosen conditions.

ochat score models/mine data/train scores
ochat score models/mine data/train scores --condition GPT4 --condition GPT3
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.console import bar, next_command

if TYPE_CHECKING:
    from ochat.evaluate.score import Scores, SupervisedTokens


@dataclass(frozen=True)
class ScoreOptions:
    """Writes nll, entropy and rank of every supervised token, and their sums.

    What is computed from them can weigh tokens: ochat prepare --token-weights.
    """

    model: Path  # an exported folder, a run (its newest checkpoint) or a checkpoint
    data: Path  # a prepared data set, or conversations in a file as `ochat prepare` reads them
    output: Path  # a new folder: tokens.safetensors, messages.parquet, conversations.parquet
    # the class in the prefixes, for all conversations alike; own: each one's own; none: no class; left out: own
    condition: tuple[str, ...] = ()
    template: str | None = None  # of a model without openchat.json: a template's name or file
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights and the computation
    device: str = "auto"  # auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
    base: str = ""  # of a checkpoint of adapters: where their base is now; empty: where the run had it


def main(options: ScoreOptions) -> None:
    """The command `ochat score`."""
    score(options, Console(highlight=False))
    next_command("ochat prepare --token-weights FILE.safetensors   # made from these scores: docs/scoring.md")


def score(options: ScoreOptions, console: Console | None = None) -> tuple[SupervisedTokens, Scores]:
    """What was written to the output.

    Raises: ConfigError, DataError and CheckpointError; before the model is loaded for all that can be known by then.
    """
    from ochat.evaluate import held_out, score_files
    from ochat.evaluate import score as scoring
    from ochat.export.open_model import folder_of, open_model
    from ochat.model.device import find_device
    from ochat.text import tokenizer as tokenizers
    from ochat.text.openchat_json import known_classes, warn_of_unknown_class

    device = find_device(options.device)
    score_files.check_output(options.output)
    folder = folder_of(options.model)
    tokenizer = tokenizers.load(folder)
    template = held_out.choose_template(options.data, folder, options.template, tokenizer)
    conditions = scoring.check_conditions(options.condition, template, tokenizer)
    for condition in set(conditions) - {scoring.OWN, scoring.NONE}:
        warn_of_unknown_class(condition, known_classes(folder))
    conversations = held_out.open_conversations(options.data, template, tokenizer)
    table = scoring.supervised_tokens(conversations, template)
    model = open_model(options.model, dtype=options.dtype, device=device, base=options.base)
    started = time.monotonic()
    with bar("conversations", len(conversations) * len(conditions)) as advance:
        scores = scoring.measure(model, template, tokenizer, conversations, table, conditions, advance)
    tokens_per_s = int(table.lengths.sum()) * len(conditions) / (time.monotonic() - started)
    files = score_files.write_scores(options.output, table, scores)
    if console:
        console.print(_summary(table, scores))
        console.print(f"{tokens_per_s:,.0f} tokens/s, prompts included")
        for path in files:
            console.print(escape(f"wrote {path}"), soft_wrap=True)
    return table, scores


def _summary(table: SupervisedTokens, scores: Scores) -> Table:
    """A row for each class and condition: means over its tokens."""
    shown = Table(title="Supervised tokens", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("class", "condition"):
        shown.add_column(name, overflow="fold")
    for name in ("conversations", "tokens", "nll", "entropy", "rank"):
        shown.add_column(name, justify="right", no_wrap=True)
    for number, condition in enumerate(scores.conditions):
        found = scores.sums(table.class_ids, len(table.class_names), number)
        for place, name in enumerate(table.class_names):
            count = len(np.unique(table.conversations[table.class_ids == place]))
            if count:
                tokens = int(found["num_tokens"][place])
                means = (*(found[key][place] / max(tokens, 1) for key in ("nll", "entropy")), found["mean_rank"][place])
                label = escape(name or "(none)")
                shown.add_row(label, escape(condition), f"{count:,}", f"{tokens:,}", *(f"{mean:.3f}" for mean in means))
    return shown
