"""`ochat export RUN OUTPUT`: write a run's weights as a Hugging Face folder that any server loads.

ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`
ochat export runs/a exported/a --best     the checkpoint with the lowest held-out loss of the expert class
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.table import Table

from ochat.console import stdout, waiting
from ochat.errors import ConfigError

if TYPE_CHECKING:
    from ochat.checkpoint.best import Choice, Evaluation


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint as a Hugging Face folder with tokenizer and chat template."""

    source: Path
    """a run folder (its newest checkpoint) or a checkpoint folder"""
    output: Path
    """the folder to write"""
    best: bool = False
    """of a run: not the newest checkpoint, but the one with the lowest held-out loss"""
    best_by: str = ""
    """the class whose held-out loss decides, or all; without it: the class with the highest weight"""
    condition: str | None = None
    """the class that its chat template uses where none is named; "": none"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the written weights"""
    adapter: bool = False
    """of a run with [lora]: write the adapter as PEFT's files instead of the merged model"""
    base: str = ""
    """of a run with [lora]: the folder of its base, if it was moved"""
    overwrite: bool = False
    """replace an exported folder that is already there"""


def main(options: ExportOptions) -> None:
    """Export a checkpoint and say which."""
    from ochat.checkpoint.best import best_checkpoint  # torch takes seconds to import
    from ochat.export.hf_folder import export
    from ochat.run import layout

    source = options.source
    if options.best_by and not options.best:
        raise ConfigError(f"--best-by {options.best_by}: chooses what --best compares; add --best")
    if options.best:
        choice = best_checkpoint(options.source, options.best_by)
        kept = {layout.step_of(folder) for folder in layout.checkpoint_folders(options.source)}
        stdout.print(best_table(f"evaluations of {options.source}", choice, kept))
        source = choice.folder
    with waiting("exporting"):
        step = export(
            source, options.output, dtype=options.dtype, overwrite=options.overwrite, base=options.base,
            condition=options.condition, adapter=options.adapter,
        )  # fmt: skip
    stdout.print(f"exported step {step} to {options.output}", markup=False, soft_wrap=True)


def best_table(title: str, choice: Choice, kept: set[int]) -> Table:
    """Every evaluation's held-out numbers, and whether the checkpoint of its step exists; the choice is marked with
    *."""
    from ochat.checkpoint.best import ALL, loss_label

    names = [name for name in choice.evaluations[0].losses if name != ALL] + [ALL]
    caption = f"*: the lowest held-out loss of {loss_label(choice.by)}. loss: nats per token. kept: as a checkpoint"
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(escape(f"{name or '(no class)'}\nloss"), justify="right")
        table.add_column("\naccuracy", justify="right")
    table.add_column("kept")
    measured = {each.step: each for each in choice.evaluations}
    for step in sorted(kept | measured.keys()):
        numbers = [number for name in names for number in _numbers(measured.get(step), name)]
        style = "bold" if step == choice.step else "" if step in kept else "dim"
        star = " *" if step == choice.step else "  "
        table.add_row(f"{step:,}{star}", *numbers, "yes" if step in kept else "-", style=style)
    return table


def _numbers(evaluation: Evaluation | None, name: str) -> tuple[str, str]:
    loss = evaluation and evaluation.losses.get(name)
    accuracy = evaluation and evaluation.accuracies.get(name)
    return "-" if loss is None else f"{loss:.4f}", "-" if accuracy is None else f"{accuracy:.1%}"
