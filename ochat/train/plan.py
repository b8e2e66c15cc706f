"""`ochat plan CONFIG.toml --section.key=value ...`: what the run will do, before it does it. Reads the data set's
lengths only."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.config import Config
from ochat.data import tokenizer as tokenizers
from ochat.data.loader import Loader
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.train import command, inputs, run_folder

LOW_FILL = " (low: the data fills few bins; lower data.bins_per_step or data.token_budget)"
BARS = " ▏▎▍▌▋▊▉█"


def main(arguments: Sequence[str]) -> None:
    """Parses the training command line and prints the plan of its run. Raises: OchatError."""
    if not arguments or "--help" in arguments or "-h" in arguments:
        command.print_help("ochat plan", "Shows what the same command line would train, without a GPU.")
        sys.exit(0 if arguments else 2)
    show(command.read_arguments(arguments), Console(highlight=False))


def show(config: Config, console: Console) -> None:
    """Prints the facts of the run and a histogram of its sequence lengths."""
    model = ModelConfig.load(config.base.path)
    hf.check_weights(config.base.path, model)
    data = inputs.open_data(config)
    held_out = inputs.open_eval_loader(config, inputs.open_eval_data(config)) if config.data.eval_path else None
    run_folder.check_data(data, held_out, tokenizers.load(config.base.path), model, config)
    facts = describe(config, inputs.open_loader(config, data, model), model)
    table = Table(
        title=f"plan of {config.run.dir}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
    )
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    console.print(table)
    console.print(histogram(data.lengths))


def describe(config: Config, loader: Loader, model: ModelConfig) -> dict[str, str]:
    """The facts of a run as name -> text; the trainer prints the same before its first step."""
    data, stats = loader.dataset, loader.stats()
    flops = inputs.sequence_flops(data, model).sum()
    classes = np.bincount(data.class_ids, minlength=len(data.class_names))
    return {
        "model": f"{model.model_type}, {model.num_parameters():,} parameters",
        "data": f"{stats.num_sequences:,} conversations, {stats.num_tokens:,} tokens, "
        f"longest {int(data.lengths.max()):,}",
        "classes": ", ".join(
            f"{name or '(none)'} {count:,} (mean weight {inputs.mean_weight(data, name):.4g})"
            for name, count in zip(data.class_names, classes, strict=True)
            if count
        ),
        "supervised": f"{stats.num_supervised:,} tokens, {stats.num_supervised / stats.num_tokens:.1%}",
        "steps": f"{stats.num_steps:,} of {_epochs(stats.steps_per_epoch)}",
        "step": f"{config.data.bins_per_step} bins of {config.data.token_budget:,} tokens: "
        f"{stats.tokens_per_step:,.0f} real, {stats.supervised_per_step:,.0f} supervised on average",
        "packing": f"fill {stats.fill:.2%}{LOW_FILL * (stats.fill < 0.5)}; work of a step's bins, max over mean: "
        f"{stats.imbalance_mean:.3f} on average, {stats.imbalance_worst:.3f} at worst",
        "work": f"{flops / stats.num_tokens:.3g} FLOPs a token, {flops:.3g} an epoch",
        "learning rate": inputs.choose_lr(config, loader, model).reason,
    }


def histogram(lengths: np.ndarray, num_bins: int = 10, width: int = 40) -> str:
    """Sequence lengths as text: a line per range of lengths, a bar and the count."""
    counts, edges = np.histogram(lengths, bins=min(num_bins, int(np.ptp(lengths)) + 1))
    lines = ["sequence lengths"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        eighths = round(8 * width * count / counts.max())
        bar = "█" * (eighths // 8) + BARS[eighths % 8].strip()
        lines.append(f"{low:>9,.0f} - {high:<9,.0f} {bar} {count:,}")
    return "\n".join(lines)


def _epochs(steps_per_epoch: Sequence[int]) -> str:
    shown = ", ".join(f"{steps:,}" for steps in steps_per_epoch[:8]) + " ..." * (len(steps_per_epoch) > 8)
    return f"{sum(steps_per_epoch):,} in {len(steps_per_epoch)} epoch{'s' * (len(steps_per_epoch) > 1)} ({shown})"
