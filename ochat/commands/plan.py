"""`ochat plan CONFIG.toml --section.key=value ...`: show what a run will do and what it will need, without a GPU.

    ochat plan run.toml --card H100 --gpus 8 --nodes 4        one kind of machine
    ochat plan run.toml --gpus 8 --nodes 1,8,64               several numbers of machines
    ochat plan run.toml --lengths lengths.npy                 before there is a data set: from lengths alone
Of the base model it needs no more than config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from ochat import config as configuration
from ochat.config import Config
from ochat.console import facts, waiting
from ochat.errors import UsageError
from ochat.plan import lengths as length_files
from ochat.plan.gpus import GPUS
from ochat.plan.lengths import LengthCounts

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from ochat.data.dataset import TokenDataset
    from ochat.data.loader import Loader, LoaderStats
    from ochat.model.config import ModelConfig
    from ochat.plan.forecast import PlanInputs

    Measured = tuple[dict[str, str], LengthCounts, LoaderStats, float]  # facts, what is trained on, FLOPs of an epoch

SCHEMA = Config
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.safetensors.index.json")
PREDICTED = (
    "Predicted, not measured: FLOPs and bytes over what the GPUs reach, with FlashAttention-2, which torch's varlen "
    "attention runs (formulas: ochat/plan/memory.py, roofline.py). Kernels that fall short make it slower."
)
NO_SPEED = "train.dtype = float32: no GPU is predicted; the rates that predictions rest on are those of bfloat16"


@dataclass(frozen=True)
class PlanOptions:
    """Shows what `ochat train` would do with the same arguments, and predicts memory and speed on known GPUs.

    Needs no GPU: steps, packing and learning rate come from the data, or from the lengths of its sequences alone.
    """

    config: Path
    """a configuration in TOML; configs/ has files to start from"""
    card: str = ""
    """one of A100-80, H100 and H200; without it: all three"""
    gpus: str = ""
    """GPUs of a node, such as 8 or 2,4,8; without it: 1 and 8"""
    nodes: str = "1"
    """nodes of so many GPUs, such as 4 or 1,8,64"""
    lengths: str = ""
    """a .npy file of sequence lengths, int32 or int64, in place of data.path, made with
    np.save("lengths.npy", np.array([len(ids) for ids in ...], dtype=np.int32))"""
    supervised: float = 0.5
    """with --lengths: the share of tokens that is trained on"""


def main(options: PlanOptions, overrides: Sequence[str] = ()) -> None:
    """Print the plan of a training command line. Raises: OchatError."""
    from ochat.model.config import ModelConfig
    from ochat.plan import run_facts
    from ochat.plan.forecast import PlanInputs
    from ochat.plan.roofline import Workload
    from ochat.train import schedule

    _check(options)
    instead = [f"--data.path={options.lengths}", "--data.mix={}"] if options.lengths else []
    config, console = configuration.load(options.config, [*overrides, *instead]), Console(highlight=False)
    model = ModelConfig.load(config.base.path)
    notes = check_base(config.base.path, model)
    measure = measure_lengths if options.lengths else measure_data
    described, counts, stats, flops = measure(config, model, options, notes, console)
    rate = schedule.choose_lr(
        config.optim.lr, supervised_tokens_per_step=stats.supervised_per_step, model_type=model.model_type,
        vocab_size=model.vocab_size, lora=config.lora.rank > 0,
    )  # fmt: skip
    steps = run_facts.describe_steps(stats, config.data, flops, rate.reason)
    console.print(facts(f"plan of {config.run.dir}", described | steps))
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    workload = Workload(counts, stats.num_supervised / counts.num_tokens, stats.fill, stats.imbalance_mean)
    sections = config.data, config.train, config.optim, config.parallel, config.lora
    show(PlanInputs(model, workload, stats.num_steps, *sections), options, console)


def measure_data(config: Config, model: ModelConfig, _: PlanOptions, notes: list[str], console: Console) -> Measured:
    """What a run takes from its data set. Prints the lengths; extends `notes`."""
    from ochat.plan import run_facts
    from ochat.train import build

    data = build.open_dataset(config)
    counts = LengthCounts.of(data.lengths)
    console.print(counts.text(), end="\n\n")
    notes += run_facts.data_notes(data.prepared) + run_facts.context_notes(counts, model.max_position_embeddings)
    loader = open_checked(config, data, model)
    counts = LengthCounts.of(data.lengths[loader.plan(0).indices])  # a mixture takes parts of sets, or repeats them
    described = run_facts.describe_data(loader, model, weights_source=config.weights.source)
    return described, counts, loader.stats(), run_facts.epoch_flops(loader, model)


def measure_lengths(
    config: Config, model: ModelConfig, options: PlanOptions, notes: list[str], console: Console
) -> Measured:
    """What a run takes from sequences of which only the lengths are known. Prints the lengths; extends `notes`."""
    from ochat.plan import run_facts

    data, share, lengths = config.data, options.supervised, length_files.read(options.lengths)
    counts = LengthCounts.of(lengths)
    console.print(counts.text(), end="\n\n")
    notes += run_facts.budget_notes(counts, data.token_budget)
    notes += run_facts.context_notes(counts, model.max_position_embeddings)
    flops = length_files.flops_of_length(model, counts.longest, share)
    with waiting(f"packing {len(lengths):,} sequences"):
        stats = length_files.pack(
            lengths, flops, share, token_budget=data.token_budget, bins_per_step=data.bins_per_step,
            seed=config.run.seed, epochs=data.epochs, max_steps=data.max_steps,
        )  # fmt: skip
    counts = counts.cut(data.token_budget)
    described = {
        "model": run_facts.describe_model(model),
        "data": f"{stats.num_sequences:,} sequences of {options.lengths}, {stats.num_tokens:,} tokens",
        "supervised": f"{share:.0%} of the tokens: assumed (--supervised)",
    }
    return described, counts, stats, float(counts.counts @ flops[: len(counts.counts)].astype(float))


def show(planned: PlanInputs, options: PlanOptions, console: Console) -> None:
    """Print predicted memory and speed on each kind and number of GPUs."""
    from ochat.plan import tables
    from ochat.plan.forecast import forecast

    if planned.train.dtype != "bfloat16":
        console.print(f"\n{NO_SPEED}", soft_wrap=True)
        return
    few = "1" if planned.optim.in_backward else "1,8" if options.nodes == "1" else "8"  # in_backward: one process
    gpus = [GPUS[options.card]] if options.card else list(GPUS.values())
    sizes = [(n, nodes) for nodes in _counts(options.nodes) for n in _counts(options.gpus or few)]
    found = [forecast(planned, gpu, gpus=n, nodes=nodes) for n, nodes in sizes for gpu in gpus]
    console.print(f"\n[dim]{escape(PREDICTED)}[/]\n")
    console.print(tables.memory_table(found, planned.data.token_budget), f"[dim]{tables.MEMORY_LEGEND}[/]\n", sep="\n")
    console.print(tables.speed_table(found), "", tables.time_table(found), f"[dim]{tables.TIME_LEGEND}[/]\n", sep="\n")
    console.print(tables.recompute_table(found))
    for note in tables.notes(found, planned):
        console.print(f"[yellow]note[/] {escape(note)}")


def check_base(path: str, model: ModelConfig) -> list[str]:
    """Check the base's weights if there are any; a note if not. Raises: as hf.check_weights."""
    from ochat.model import hf

    folder = Path(path)
    if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
        hf.check_weights(folder, model)
        return []
    return [f"{folder} has a config.json and no weights: enough for a plan, not for training"]


def open_checked(config: Config, data: TokenDataset, model: ModelConfig) -> Loader:
    """The run's loader, once data, held-out data, tokenizer and model are known to belong together."""
    from ochat.text import tokenizer as tokenizers
    from ochat.train import build, identity

    held_out = build.open_eval_dataset(config) if config.data.eval_path else None
    if any(Path(config.base.path).glob("tokenizer*")):
        identity.check_inputs(data, held_out, tokenizers.load(config.base.path), model, config.base.path)
    return build.open_loader(config, data, model)


def _counts(text: str) -> list[int]:
    """The numbers of a list such as 1,8,64; 0 for a word that is none."""
    return [int(word) if word.isdecimal() else 0 for word in text.split(",")]


def _check(options: PlanOptions) -> None:
    most, several = 10**5, "whole numbers from 1 up, such as 8 or 1,8,64"
    for is_right, option, value, expected in (
        (options.card in ("", *GPUS), "--card", options.card, f"one of {', '.join(GPUS)}"),
        (all(1 <= n <= most for n in _counts(options.gpus or "1")), "--gpus", options.gpus, several),
        (all(1 <= n <= most for n in _counts(options.nodes)), "--nodes", options.nodes, several),
        (0 < options.supervised <= 1, "--supervised", options.supervised, "a share above 0, up to 1"),
    ):
        if not is_right:
            raise UsageError(f"{option} {value}: expected {expected}")
