"""`ochat new --base BASE --data DATA --gpus 8 --output run.toml`: a commented config for this base, data and machine.

Sizes of bins and steps, the learning rate and train.recompute are what `ochat plan` computes for the data; rewards are
the paper's, 1 for the experts and 0.1 for the others. What is missing is asked for on a terminal.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ochat import config as configuration
from ochat.config import Config
from ochat.console import next_command
from ochat.errors import ConfigError, UsageError
from ochat.files import atomic
from ochat.plan.gpus import GPUS, lookup

if TYPE_CHECKING:  # torch takes seconds to import
    from ochat.data.dataset import TokenDataset
    from ochat.data.loader import LoaderStats
    from ochat.model.config import ModelConfig
    from ochat.plan.forecast import Forecast

EPOCHS = 3
SUPERVISED = 200_000  # tokens of a step that the learning rate's rule is made for
STEPS = 20  # of an epoch, at least: fewer give the schedule no time
MOST_TOKENS = 16_384  # of a bin; longer ones gain nothing
LEAST_LR = 1e-5  # the rule gives less for small steps
LADDER: tuple[tuple[str, dict[str, Any]], ...] = (  # what is tried in turn until the run fits
    ("", {}),
    (
        "masters and moments in bfloat16 (stochastic rounding), as float32 does not fit",
        {"optim": {"master_dtype": "bfloat16", "moment_dtype": "bfloat16"}},
    ),
    ("adapters, as full training does not fit", {"lora": {"rank": 16, "alpha": 32.0}}),
)


@dataclass(frozen=True)
class NewOptions:
    """Writes a commented config for a base, prepared data and a machine.

    On a terminal it asks for what is not given.
    """

    base: str = ""
    """a model folder that `ochat init-base` made"""
    data: str = ""
    """a folder that `ochat prepare` wrote"""
    gpus: int | None = None
    """of the machine; 0: a CPU; without it: those that torch sees"""
    card: str = ""
    """A100-80, H100, H200, RTX4090 (24 GB) or RTX4080 (16 GB); without it: that of this machine, else H100"""
    expert: str = ""
    """the class of the best answers; without it: the template's default, or the class of the highest weight"""
    output: str = ""
    """the file to write; without it the config is printed"""


@dataclass(frozen=True)
class Draft:
    """A config and what is known of it."""

    tree: dict[str, Any]
    why: str  # of what LADDER added
    stats: LoaderStats
    lr: float
    lr_reason: str  # in a few words
    found: Forecast | None  # None: on a CPU


def main(options: NewOptions) -> None:
    """Writes or prints the config. Raises: OchatError."""
    base = options.base or _ask("base, a folder that `ochat init-base` made", "--base")
    data = options.data or _ask("data, a folder that `ochat prepare` wrote", "--data")
    if options.card not in ("", *GPUS):
        raise UsageError(f"--card {options.card}: expected one of {', '.join(GPUS)}")
    if options.output and Path(options.output).exists():
        raise ConfigError(f"{options.output} exists; name another --output, or remove it")
    import torch

    from ochat.data.dataset import TokenDataset
    from ochat.model.config import ModelConfig

    gpus = torch.cuda.device_count() if options.gpus is None else options.gpus
    if options.gpus is None and sys.stdin.isatty():
        gpus = int(_ask(f"GPUs, 0 for a CPU [{gpus}]", "--gpus") or gpus)
    if gpus < 0:
        raise UsageError(f"--gpus {gpus}: expected 0, for a CPU, or a number of GPUs")
    here = lookup(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    card = options.card or (here.name if here else "H100")
    model, dataset = ModelConfig.load(base), TokenDataset(data)
    text = write(draft(base, data, dataset, model, gpus, card), dataset, gpus, card, _expert(options.expert, dataset))
    overrides_of = ["--gpus", str(gpus)] if gpus > 1 else []
    if not options.output:
        print(text, end="")
        print(f"# next: save this as run.toml, and run: {' '.join(['ochat check run.toml', *overrides_of])}")
        return
    atomic.write_text(Path(options.output), text)
    configuration.load(options.output)  # what is written can be read
    next_command("ochat check", options.output, *overrides_of)


def draft(base: str, data: str, dataset: TokenDataset, model: ModelConfig, gpus: int, card: str) -> Draft:
    """The first of LADDER that fits; the last one where none does."""
    longest, made = int(dataset.lengths.max(initial=1)), None
    enough = int(dataset.lengths.sum()) // (STEPS * max(gpus, 1))  # tokens of a bin where a step has one a GPU
    for why, more in LADDER:
        budget = rounded(max(longest, min(4 * longest, MOST_TOKENS, enough)))
        made = _draft(base, data, dataset, model, gpus, card, budget, why, more)
        if made.found and not made.found.fits and longest <= made.found.largest_budget:
            made = _draft(base, data, dataset, model, gpus, card, made.found.largest_budget, why, more)
        if made.found is None or made.found.fits:
            break
    assert made is not None
    return made


def _draft(
    base: str, data: str, dataset: TokenDataset, model: ModelConfig, gpus: int, card: str, budget: int, why: str,
    more: dict[str, Any],
) -> Draft:  # fmt: skip
    from ochat.plan.forecast import PlanInputs, forecast
    from ochat.plan.lengths import LengthCounts
    from ochat.plan.roofline import Workload
    from ochat.train import build, schedule

    held_out = Path(f"{data.rstrip('/')}-held-out")
    sets = {"path": data} | ({"eval_path": str(held_out)} if held_out.is_dir() else {})
    bins = bins_of(int(dataset.lengths.sum()), int(dataset.supervised.sum()), budget, max(gpus, 1))
    tree: dict[str, Any] = {
        "run": {"dir": f"runs/{Path(data).name}"},
        "base": {"path": base},
        "data": sets | {"token_budget": budget, "bins_per_step": bins, "epochs": EPOCHS},
        **more,
    }
    config: Config = configuration.from_tree(tree)
    stats = build.open_loader(config, dataset, model).stats()
    lr, _ = schedule.choose_lr("auto", stats.supervised_per_step, model, lora=config.lora.rank > 0)
    reason = f"the rule for {stats.supervised_per_step:,.0f} supervised tokens a step"
    if lr < LEAST_LR and stats.supervised_per_step < schedule.MIN_TOKENS:
        lr, reason = LEAST_LR, f"{reason} gives {lr:.1e}; small steps: 1e-5 to 3e-4"
    found = None
    if gpus:
        share = stats.num_supervised / max(stats.num_tokens, 1)
        workload = Workload(LengthCounts.of(dataset.lengths), share, stats.fill, stats.imbalance_mean)
        sections = config.data, config.train, config.optim, config.parallel, config.lora
        found = forecast(PlanInputs(model, workload, stats.num_steps, *sections), GPUS[card], gpus=gpus, nodes=1)
    return Draft(tree, why, stats, lr, reason, found)


def bins_of(tokens: int, supervised: int, budget: int, gpus: int) -> int:
    """Bins of a step: about SUPERVISED tokens, at least STEPS steps an epoch, and a multiple of the GPUs."""
    in_a_bin = max(supervised * budget / max(tokens, 1), 1)
    bins = min(SUPERVISED / in_a_bin, tokens / budget / STEPS)
    return gpus * max(int(bins / gpus), 1)


def rounded(tokens: int) -> int:
    """Up to a multiple of 64."""
    return -(-tokens // 64) * 64


def write(made: Draft, dataset: TokenDataset, gpus: int, card: str, expert: str) -> str:
    """The config as TOML with its comments."""
    data, stats, longest = made.tree["data"], made.stats, int(dataset.lengths.max(initial=1))
    steps = stats.steps_per_epoch[0]
    few = f", which are few: {STEPS} or more give the schedule time" if steps < STEPS else ""
    sizes = f"{stats.tokens_per_step:,.0f} tokens a step, {stats.supervised_per_step:,.0f} supervised"
    machine = f"{gpus} {card}" if gpus else "a CPU"
    parts = [
        f"# Written by `ochat new` for {machine}: `ochat plan` predicts the run, `ochat train` starts it.",
        _section("run", made.tree["run"], {"dir": "checkpoints, metrics and the export"}),
        _section("base", made.tree["base"], {}),
        _section(
            "data",
            data,
            {
                "eval_path": "held-out: measured at the end of every epoch",
                "token_budget": f"tokens of a micro-batch; the longest conversation has {longest:,}",
                "bins_per_step": sizes,
                "epochs": f"of {steps:,} steps each{few}",
            },
        ),
        classes(dataset, expert),
    ]
    optim = {"lr": float(f"{made.lr:.3g}"), "warmup_ratio": 0.05} | made.tree.get("optim", {})
    parts.append(_section("optim", optim, {"lr": made.lr_reason, "master_dtype": made.why}))
    if "lora" in made.tree:
        parts.append(_section("lora", made.tree["lora"], {"rank": made.why}))
    train: dict[str, Any] = {"dtype": "bfloat16"} | ({} if gpus else {"device": "cpu"})
    notes = {"dtype": "of activations and products"}
    if made.found:
        use, room = made.found.use.total / 2**30, made.found.gpu.memory_gib
        train["recompute"] = made.found.recompute
        fits = f"{use:,.1f} of {room:,.1f} GiB" if made.found.fits else f"does not fit: {use:,.1f} of {room:,.1f} GiB"
        notes["recompute"] = f"predicted on {gpus} {card}: {fits}, {made.found.speed.step_seconds:,.2f} s a step"
    parts.append(_section("train", train, notes))
    parts.append(_section("checkpoint", {"keep": 2}, {"keep": "newest checkpoints"}))
    return "\n\n".join(parts) + "\n"


def classes(dataset: TokenDataset, expert: str) -> str:
    """The [classes] of the data, with the paper's rewards."""
    present = list(dataset.present)
    if dataset.levels:
        return _section("weights", {"source": "reward"}, {"source": "each conversation's own reward"})
    if present in ([], [""]):
        return "# The data has no classes: each answer weighs 1. `ochat prepare --map` makes classes from a key."
    counts = dataset.class_counts()
    lines = ["# The weight of a class is exp((reward - 1) / beta): by default 1 for reward 1, and 0.1 for reward 0.1."]
    for name in sorted(present, key=lambda name: name != expert):
        key = name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
        what = "the experts" if name == expert else "less good"
        lines += [_section(f"classes.{key}", {"reward": 1.0 if name == expert else 0.1},
                           {"reward": f"{what}; {counts.get(name, 0):,} conversations"})]  # fmt: skip
    return "\n".join(lines)


def _expert(asked: str, dataset: TokenDataset) -> str:
    """Raises: ConfigError for a class that the data lacks."""
    from ochat.train import identity

    identity.check_classes("--expert", [asked], dataset)
    return asked or identity.served_template(dataset).default_condition


def _section(name: str, values: dict[str, Any], comments: dict[str, str]) -> str:
    """A table of TOML, with its comments aligned."""
    lines = {key: f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()}
    width = max((len(line) for key, line in lines.items() if comments.get(key)), default=0)
    told = (f"{line:<{width}}  # {comments[key]}" if comments.get(key) else line for key, line in lines.items())
    return "\n".join([f"[{name}]", *told])


def _ask(question: str, option: str) -> str:
    """An answer from the terminal. Raises: UsageError where there is none."""
    if not sys.stdin.isatty():
        raise UsageError(f"{option} is missing; give it, or run `ochat new` on a terminal, where it asks")
    print(f"{question}: ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
