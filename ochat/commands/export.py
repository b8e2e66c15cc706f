"""`ochat export RUN OUTPUT`: write a run's weights as a Hugging Face folder that any server loads.

ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`
ochat export runs/a exported/a --best     the checkpoint with the lowest held-out loss of the expert class
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ochat.console import stdout, waiting
from ochat.errors import ConfigError


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
    from ochat.export.hf_folder import export, export_adapter

    source = options.source
    if options.best_by and not options.best:
        raise ConfigError(f"--best-by {options.best_by}: chooses what --best compares; add --best")
    if options.best:
        source, table = best_checkpoint(options.source, options.best_by)
        stdout.print(table)
    more = {"overwrite": options.overwrite, "condition": options.condition}
    with waiting("exporting"):
        if options.adapter:
            step = export_adapter(source, options.output, **more)
        else:
            step = export(source, options.output, dtype=options.dtype, base=options.base, **more)
    stdout.print(f"exported step {step} to {options.output}", markup=False, soft_wrap=True)
