"""`ochat plan CONFIG.toml --section.key=value ...`: what a run will do and what it will need, before it does it.

    ochat plan run.toml --card H100 --gpus 8 --nodes 4        one kind of machine
    ochat plan run.toml --lengths lengths.npy                 before there is a data set: lengths alone
Needs no GPU, and of the base model no more than its config.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ochat.commands import train as train_command
from ochat.config import Config
from ochat.data.dataset import TokenDataset
from ochat.data.loader import Loader
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.plan import lengths as length_files
from ochat.plan import plan_lengths, tables
from ochat.plan.forecast import Run
from ochat.plan.gpus import CARDS
from ochat.plan.lengths import LengthCounts
from ochat.plan.roofline import Workload
from ochat.plan.run_facts import describe
from ochat.text import tokenizer as tokenizers
from ochat.train import identity, inputs, schedule

WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.safetensors.index.json")
PURPOSE = """Shows what the same command line would train, without a GPU: steps, packing, learning rate; and predicts
memory and speed on named cards.

  --card NAME         {cards} (default: all three)
  --gpus N            GPUs of a node (default: 1 and 8, and speed on 8, 64 and 512)
  --nodes N           nodes of so many GPUs (default: 1)
  --lengths FILE.npy  plan from the lengths of sequences alone, int32 or int64, in place of data.path; made with
                      {how}
  --supervised SHARE  with --lengths: the share of tokens that is trained on (default: 0.5)"""


def main(arguments: Sequence[str]) -> None:
    """Parses the plan's own options and the training command line, and prints the plan. Raises: OchatError."""
    purpose = PURPOSE.format(cards=", ".join(CARDS), how=escape(length_files.HOW_TO_MAKE))
    train_command.explain_if_asked(arguments, "ochat plan", purpose)
    options, rest = parse(arguments)
    if options.lengths:
        rest += [f"--data.path={options.lengths}", "--data.mix={}"]
    show(train_command.read_arguments(rest), options, Console(highlight=False))


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The plan's own options, and what is left for the training command line; a wrong value ends with usage."""
    parser = argparse.ArgumentParser("ochat plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--card", choices=sorted(CARDS))
    parser.add_argument("--gpus", type=_count)
    parser.add_argument("--nodes", type=_count, default=1)
    parser.add_argument("--lengths", default="")
    parser.add_argument("--supervised", type=_share, default=0.5)
    return parser.parse_known_args(arguments)


def show(config: Config, options: argparse.Namespace, console: Console) -> None:
    """Prints the lengths, the facts of the run, what to know about them, and the forecasts."""
    model = ModelConfig.load(config.base.path)
    notes = check_base(config, model)
    if options.lengths:
        lengths = length_files.read(options.lengths)
        counts = LengthCounts.of(lengths)
        console.print(counts.text(), end="\n\n")
        notes += plan_lengths.notes(config, model, counts)
        stats = plan_lengths.pack(config, model, lengths, counts, options.supervised, console)
        counts = counts.cut(config.data.token_budget)
        lr = schedule.choose_lr(
            config.optim.lr,
            supervised_tokens_per_step=stats.supervised_per_step,
            model_type=model.model_type,
            vocab_size=model.vocab_size,
        )
        facts = plan_lengths.describe(config, model, stats, counts, options, lr.reason)
    else:
        data = inputs.open_data(config)
        counts = LengthCounts.of(data.lengths)
        console.print(counts.text(), end="\n\n")
        loader = open_checked(config, data, model)
        lr, stats = inputs.choose_lr(config, loader, model), loader.stats()
        facts = describe(loader, model, config.data, weights_source=config.weights.source, lr_reason=lr.reason)
        notes += data_notes(data, model, counts)
        counts = LengthCounts.of(data.lengths[loader.plan(0).indices])  # a mixture takes parts of sets, or more
    share = stats.num_supervised / max(counts.num_tokens, 1)
    workload = Workload(counts, share, stats.fill, stats.imbalance_mean)
    console.print(tables.facts(f"plan of {config.run.dir}", facts))
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    tables.show(Run(model, config, workload, stats.num_steps), options, console)


def check_base(config: Config, model: ModelConfig) -> list[str]:
    """Checks what there is of the base's weights; notes on what is missing and not needed yet. Raises: as
    hf.check_weights."""
    folder = Path(config.base.path)
    if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        hf.check_weights(folder, model)
        return []
    return [f"{folder} has a config.json and no weights: enough for a plan, not for training"]


def open_checked(config: Config, data: TokenDataset, model: ModelConfig) -> Loader:
    """The run's loader, once data, held-out data, tokenizer and model are known to belong together."""
    held_out = inputs.open_eval_loader(config, inputs.open_eval_data(config)) if config.data.eval_path else None
    if any(Path(config.base.path).glob("tokenizer*")):
        identity.check_data(data, held_out, tokenizers.load(config.base.path), model, config)
    return inputs.open_loader(config, data, model)


def data_notes(data: TokenDataset, model: ModelConfig, counts: LengthCounts) -> list[str]:
    """Sequences that preparation cut or left out, and those the model was not made for."""
    notes = []
    for folder, manifest in data.manifests.values():
        of = f" of {folder}" if len(data.manifests) > 1 else ""
        notes += [
            f"{count:,} conversations{of} were longer than the context of {manifest['context']:,} tokens and were "
            f"{what} by prepare"
            for key, what in (("truncated", "cut"), ("too_long", "left out"))
            if (count := manifest.get("counts", {}).get(key))
        ]
    return notes + plan_lengths.beyond_context(model, counts)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**5:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 up")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0, up to 1")
    return share
