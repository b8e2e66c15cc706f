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
from ochat.console import facts, next_command, waiting
from ochat.errors import UsageError
from ochat.plan import lengths as length_files
from ochat.plan.gpus import GPUS, LARGE
from ochat.plan.lengths import LengthCounts

if TYPE_CHECKING:  # torch takes seconds to import; --help should not
    from ochat.data.dataset import TokenDataset
    from ochat.data.loader import LoaderStats
    from ochat.model.config import ModelConfig

SCHEMA = Config
MAX_COUNT = 10**5  # of GPUs and of nodes
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.gguf", "*.safetensors.index.json")
NO_SPEED = "train.dtype = float32: no GPU is predicted; the rates that predictions rest on are those of bfloat16"


@dataclass(frozen=True)
class PlanOptions:
    """Shows what `ochat train` would do with the same arguments, and predicts memory and speed on known GPUs.

    Needs no GPU: steps, packing and learning rate come from the data, or from the lengths of its sequences alone.
    """

    config: Path
    """a configuration in TOML; configs/ has files to start from"""
    card: str = ""
    """one of A100-80, H100, H200, RTX4090 (24 GB) and RTX4080 (16 GB); without it: the first three"""
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
    from ochat.plan import tables
    from ochat.plan.forecast import PlanInputs, forecast
    from ochat.plan.roofline import Workload
    from ochat.train import build, schedule

    if options.card not in ("", *GPUS):
        raise UsageError(f"--card {options.card}: expected one of {', '.join(GPUS)}")
    if not 0 < options.supervised <= 1:
        raise UsageError(f"--supervised {options.supervised}: expected a share above 0, up to 1")
    nodes, gpus = _counts("--nodes", options.nodes), options.gpus and _counts("--gpus", options.gpus)
    instead = [f"--data.path={options.lengths}", "--data.mix={}"] if options.lengths else []
    config, console = configuration.load(options.config, [*overrides, *instead]), Console(highlight=False)
    model = ModelConfig.load(config.base.path)
    data = None if options.lengths else build.open_dataset(config)
    notes = check(config, data, model)
    lengths = data.lengths if data else length_files.read(options.lengths)
    counts = LengthCounts.of(lengths)
    console.print(counts.text(), end="\n\n")
    notes += tables.data_notes(data.prepared) if data else []
    notes += tables.length_notes(counts, config.data.token_budget, model.max_position_embeddings)

    def lr_reason(stats: LoaderStats) -> str:
        return schedule.choose_lr(config.optim.lr, stats.supervised_per_step, model, lora=config.lora.rank > 0)[1]

    if data:
        loader = build.open_loader(config, data, model)
        stats, source = loader.stats(), config.weights.source
        counts = LengthCounts.of(data.lengths[loader.plan(0).indices])  # a mixture takes parts of sets, or repeats them
        described = tables.describe(loader, model, config.data, weights_source=source, lr_reason=lr_reason(stats))
        has_negative = data.has_negative_weights()
        described |= tables.describe_loss(config.loss, has_negative)
        notes += tables.loss_warnings(config.loss, has_negative)
    else:
        with waiting(f"packing {len(lengths):,} sequences"):
            stats, flops = length_files.pack(lengths, model, config.data, options.supervised, config.run.seed)
        counts = counts.cut(config.data.token_budget)
        described = {
            "model": tables.describe_model(model),
            "data": f"{stats.num_sequences:,} sequences of {options.lengths}, {stats.num_tokens:,} tokens",
            "supervised": f"{options.supervised:.0%} of the tokens: assumed (--supervised)",
            **tables.describe_steps(stats, config.data, flops, lr_reason(stats)),
        }
    console.print(facts(f"plan of {config.run.dir}", described))
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    if config.train.dtype != "bfloat16":
        console.print(f"\n{NO_SPEED}", soft_wrap=True)
        return _next(options, overrides)
    workload = Workload(counts, stats.num_supervised / counts.num_tokens, stats.fill, stats.imbalance_mean)
    sections = config.data, config.train, config.optim, config.parallel, config.lora, config.base
    inputs = PlanInputs(model, workload, stats.num_steps, *sections)
    if not gpus:  # updates in backward need one process
        gpus = [1] if config.optim.in_backward else [1, 8] if nodes == [1] else [8]
    cards = [GPUS[options.card]] if options.card else LARGE
    found = [forecast(inputs, card, gpus=n, nodes=m) for m in nodes for n in gpus for card in cards]
    console.print("", *tables.tables(found, inputs), sep="\n")
    _next(options, overrides)


def _next(options: PlanOptions, overrides: Sequence[str]) -> None:
    """What comes after a plan of data that is there."""
    if not options.lengths:
        counts = {"--gpus": options.gpus, "--nodes": options.nodes}
        given = [
            word for option, count in counts.items() if count.isdecimal() and count != "1" for word in (option, count)
        ]
        next_command("ochat check", options.config, *given, *overrides)


def check(config: Config, data: TokenDataset | None, model: ModelConfig) -> list[str]:
    """Check that what is there of base, data, held-out sets and exams belongs together; a note where weights are not.

    Raises: as build.check_model, identity.check_inputs, eval_sets.check_best, hf.open_tensors and ExactTask.read.
    """
    from ochat.model import hf
    from ochat.text import tokenizer as tokenizers
    from ochat.train import build, identity
    from ochat.train.evaluations import sets as eval_sets

    build.check_model(config, model)
    base = Path(config.base.path)
    held_out = build.open_held_out(config) if data else {}
    if data and any(base.glob("tokenizer*")):
        tokenizer = tokenizers.load(config.base.path)
        identity.check_inputs(data, held_out.values(), tokenizer, model, config.base.path)
        tasks = build.open_tasks(config, data, tokenizer, model)
        eval_sets.check_best(config.checkpoint.best, held_out, tasks)
    if any(next(base.glob(pattern), None) for pattern in WEIGHTS):
        hf.open_tensors(base, model)
        return []
    return [f"{base} has a config.json and no weights: enough for a plan, not for training"]


def _counts(option: str, text: str) -> list[int]:
    """The numbers of a list such as 1,8,64. Raises: UsageError."""
    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= MAX_COUNT for word in words):
        raise UsageError(f"{option} {text}: expected whole numbers from 1 up, such as 8 or 1,8,64")
    return [int(word) for word in words]
