"""`ochat export RUN OUTPUT`: write a run's weights as a Hugging Face folder that any server loads.

ochat export runs/a exported/a            the newest checkpoint of a run, or `runs/a/checkpoints/step_20`
ochat export runs/a exported/a --gguf a.gguf
ochat export runs/a exported/a --best     the best checkpoint, by default by the held-out loss of the expert class
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.markup import escape
from rich.table import Table

from ochat import config as configuration
from ochat.console import next_command, stdout, waiting
from ochat.errors import ConfigError

if TYPE_CHECKING:
    from ochat.checkpoint.best import Choice

ONLY_PEFT = (
    "PEFT and transformers read this adapter exactly. vLLM refuses it, for the trained rows of the template's tokens "
    '(trainable_tokens_delta): for vLLM, export without --adapter, or train with lora.tokens = "none"'
)
MOST_CHATS = 5000  # in which messages are counted: seconds


@dataclass(frozen=True)
class ExportOptions:
    """Writes a checkpoint as a Hugging Face folder with tokenizer and chat template."""

    source: Path
    """a run folder (its newest checkpoint) or a checkpoint folder"""
    output: Path
    """the folder to write"""
    best: bool = False
    """of a run: not the newest checkpoint, but the best one by its held-out numbers"""
    best_by: str = ""
    """what decides: a class, by its held-out loss, or all; or a measure as in checkpoint.best, such as NAME.exact;
    without it: the run's checkpoint.best, else the class with the highest weight"""
    condition: str | None = None
    """the class that its chat template uses where none is named; "": none"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """of the written weights"""
    adapter: bool = False
    """of a run with [lora]: write the adapter as PEFT's files instead of the merged model"""
    ema: bool = False
    """of a run with optim.ema: write the moving average of its weights instead of the weights"""
    boundary: Literal["auto", "always", "never"] = "auto"
    """the mark between a prefix and its message where a server could merge them, for templates that tokenise each
    alone; auto: where transformers and vLLM read it; llama.cpp never does"""
    data: tuple[Path, ...] = ()
    """what messages are counted in that an export without the mark changes: prepared data or conversations; left out:
    the run's"""
    gguf: Path | None = None
    """a file to write for llama.cpp, too, by its own converter"""
    base: str = ""
    """of a run with [lora]: the folder of its base, if it was moved"""
    overwrite: bool = False
    """replace an exported folder that is already there"""


def main(options: ExportOptions) -> None:
    """Export a checkpoint and say which."""
    from ochat.checkpoint.best import best_checkpoint  # torch takes seconds to import
    from ochat.export import gguf_file
    from ochat.export.hf_folder import export
    from ochat.model.peft import AdapterConfig
    from ochat.run import layout

    source = options.source
    if options.best_by and not options.best:
        raise ConfigError(f"--best-by {options.best_by}: chooses what --best compares; add --best")
    if options.best:
        choice = best_checkpoint(options.source, options.best_by)
        kept = {layout.step_of(folder) for folder in layout.checkpoint_folders(options.source)}
        stdout.print(best_table(f"evaluations of {options.source}", choice, kept))
        source = choice.folder
    if options.gguf:
        gguf_file.find_converter()
        if options.adapter:
            raise ConfigError("--gguf writes a whole model; leave out --adapter")
        if options.gguf.exists() and not options.overwrite:
            raise ConfigError(f"{options.gguf}: exists; add --overwrite to replace it")
    with waiting("exporting"):
        step = export(
            source, options.output, dtype=options.dtype, overwrite=options.overwrite, base=options.base,
            condition=options.condition, adapter=options.adapter, ema=options.ema, boundary=options.boundary,
        )  # fmt: skip
    what = f"the average of weights at step {step}" if options.ema else f"step {step}"
    stdout.print(f"exported {what} to {options.output}", markup=False, soft_wrap=True)
    if options.adapter and AdapterConfig.read(options.output).token_ids:
        stdout.print(ONLY_PEFT, markup=False, soft_wrap=True)
    if options.gguf:
        with waiting("converting"):
            gguf_file.write(options.output, options.gguf, options.dtype)
        stdout.print(f"wrote {options.gguf}", markup=False, soft_wrap=True)
    if note := boundary_note(options):
        stdout.print(note, markup=False, soft_wrap=True)
    next_command("ochat chat", options.source if options.adapter else options.output)


def boundary_note(options: ExportOptions) -> str:
    """How many messages get other ids from the export than in training, if it needs a boundary and has none."""
    from ochat.evaluate import chats
    from ochat.export import serving
    from ochat.text import tokenizer as tokenizers
    from ochat.text.openchat_json import load_template

    tokenizer = tokenizers.load(options.output)
    template = load_template(options.output, None, tokenizer)
    if not serving.lacks_boundary(options.output, template, tokenizer):
        return ""
    data = options.data or _data_of_run(options.source)
    if not data:
        return "without it, servers may give other ids than training where the two merge; --data DATA counts how often"
    found = chats.read_chats(data, template, tokenizer, MOST_CHATS)
    changed, count = chats.count_changed(options.output, template, tokenizer, found)
    share = changed / max(count, 1)
    return f"without it, {changed:,} of {count:,} messages ({share:.1%}) get other ids from servers than in training"


def _data_of_run(source: Path) -> tuple[Path, ...]:
    """The data sets of the run that a checkpoint is of, if they are still there."""
    from ochat.run import layout

    places = [folder / layout.CONFIG for folder in (source, source.parent.parent)]
    path = next(filter(Path.is_file, places), None)
    if path is None:
        return ()
    data = configuration.load(path).data
    found = [data.path, *(each.path for each in data.mix.values())]
    paths = [Path(one) for each in found for one in ([each] if isinstance(each, str) else each) if one]
    return tuple(paths) if all(each.is_dir() for each in paths) else ()


def best_table(title: str, choice: Choice, kept: set[int]) -> Table:
    """Every evaluation's numbers of the set that decides, and whether the checkpoint of its step exists; the choice is
    marked with *."""
    from ochat.checkpoint.best import columns
    from ochat.checkpoint.measure import ALL, LOSS, class_label

    shown = [measure for measure in columns(choice.evaluations) if measure.of == choice.by.of]
    nats = " loss: nats per token." * any(measure.kind == LOSS for measure in shown)
    caption = f"*: {choice.by.best_in_words}.{nats} kept: as a checkpoint"
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    table.add_column("step", justify="right")
    for measure, before in zip(shown, [None, *shown], strict=False):
        name = ALL if measure.name is None else class_label(measure.name)
        is_repeated = before is not None and before.name == measure.name
        table.add_column(escape(f"{'' if is_repeated else name}\n{measure.kind}"), justify="right")
    table.add_column("kept")
    measured = {each.step: each for each in choice.evaluations}
    for step in sorted(kept | measured.keys()):
        found = measured[step].numbers if step in measured else {}
        numbers = [measure.shown(found.get(measure)) for measure in shown]
        style = "bold" if step == choice.step else "" if step in kept else "dim"
        star = " *" if step == choice.step else "  "
        table.add_row(f"{step:,}{star}", *numbers, "yes" if step in kept else "-", style=style)
    return table
