"""Configuration: a TOML file plus `--section.key=value` options become one frozen `Config`.

    config = load("configs/demo.toml", ["--optim.lr=2e-5", "--run.dir=runs/a"])

Each section is a frozen dataclass below; an unknown key, a wrong type or an impossible value is a ConfigError that
names the key, the value, what was expected and the nearest known key. `dump(config)` is TOML again, which the run
folder keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ochat import typed_toml
from ochat.errors import ConfigError
from ochat.typed_toml import expect

ABLATE = "ablate"  # a section beside these, read by ochat/evaluate/ablate/variants.py


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = "runs/default"  # the run folder: config, metrics, checkpoints
    seed: int = 0  # decides the order of the data and every random draw
    deterministic: bool = False  # bitwise the same on the same machine and number of processes; slower on CUDA
    resume: str = "auto"  # "auto": the newest whole checkpoint in run.dir, if any; "never"; or a checkpoint's path
    resume_mismatched: bool = False  # go on although template, data set or order of the data are not the checkpoint's


@dataclass(frozen=True)
class BaseConfig:
    """The model that is fine-tuned."""

    path: str = ""  # a Hugging Face folder with safetensors


@dataclass(frozen=True)
class MixConfig:
    """One of several data sets, and what an epoch takes of it: at most one of epochs, tokens and ratio."""

    path: str = ""  # a folder written by `ochat prepare`
    epochs: float | None = None  # passes over it, 0.5 is another half each time; nothing given: 1
    tokens: int | None = None  # so many tokens of it
    ratio: float | None = None  # in proportion to the other ratios, until the first set with one is used up


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut into steps."""

    path: str = ""  # a folder written by `ochat prepare`
    mix: dict[str, MixConfig] = field(default_factory=dict)  # several sets instead of path
    eval_path: str = ""  # a held-out folder of the same kind; empty: no evaluation
    verify: bool = True  # compare every file with its checksum at the start, about 1 s a GB, shared by the processes
    token_budget: int = 8192  # tokens in a bin, that is in one micro-batch
    bins_per_step: int = 8  # bins in an optimizer step, over all ranks
    epochs: int = 1  # passes over the data
    max_steps: int = 0  # stop after so many steps; 0: all epochs
    only_class: str = ""  # keep this class alone (the paper's "only expert" and "only sub-optimal")
    subsample: dict[str, float] = field(default_factory=dict)  # class -> share of its conversations that is kept


@dataclass(frozen=True)
class ClassConfig:
    """What an answer of one class weighs: `weight`, or `exp((reward - 1) / beta)`. Give exactly one of reward and
    weight."""

    reward: float | None = None  # 1 for the experts, less for the others
    weight: float | None = None  # what an answer of the class weighs, instead of a reward
    beta: float | None = None  # of this class's reward; left out: weights.beta


@dataclass(frozen=True)
class WeightsConfig:
    """Where the weight of a supervised message comes from.

    record: the record's own weights; classes: the [classes] table; reward: each conversation's `reward` field;
    none: every supervised token weighs 1.
    """

    source: Literal["auto", "record", "classes", "reward", "none"] = "auto"  # auto: classes if given, else record
    beta: float = 0.9 / math.log(10)  # rewards 1 and 0.1 become weights 1 and 0.1, the paper's
    per_message_mean: bool = False  # divide a message's weight by its number of tokens


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, clipping and the learning-rate schedule (linear warm-up, then cosine)."""

    lr: float | Literal["auto"] = "auto"  # peak learning rate; "auto" goes by the supervised tokens of a step
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; norms and biases have none
    clip: float = 1.0  # largest gradient norm; 0: no clipping
    master_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of the weights that are updated; bfloat16: stochastic rounding
    )
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's two moments; bfloat16: stochastic rounding
    in_backward: bool = False  # update each weight as soon as its gradient is there: no gradients are held; one process
    warmup_ratio: float = 0.05  # share of the steps in which the rate rises
    min_lr_ratio: float = 0.1  # share of the peak at which the cosine ends


Recompute = Literal["auto", "none", "elementwise", "block"]


@dataclass(frozen=True)
class TrainConfig:
    """How a step is computed, and how often it is reported."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of activations and products; weights: optim.master_dtype
    kernels: Literal["auto", "triton", "reference"] = "auto"  # auto: triton on CUDA, plain PyTorch elsewhere
    attention: Literal["auto", "varlen", "sdpa"] = "auto"  # auto: varlen on CUDA in bfloat16, else SDPA by document
    recompute: Recompute = "auto"  # in backward: elementwise, but no product; a whole block; auto: the least that fits
    offload_activations: bool = False  # inputs of blocks wait in host memory, and all else is recomputed
    compile: bool = False  # torch.compile, block by block
    log_every: int = 1  # steps between two reads of the metrics from the device
    max_nonfinite_steps: int = (
        0  # steps of NaN or infinite loss or gradient that a run skips, restarts included; more end it
    )
    eval_every: int = 0  # steps between held-out evaluations; 0: at the end of every epoch
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: CUDA if there is a card
    peak_tflops: float = 0.0  # the peak that mfu is taken of; 0: the card's data sheet, or a product timed at start


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a block, by Hugging Face


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters over frozen weights instead of training every weight."""

    rank: int = 0  # of each adapter, 16 is usual; 0: off, every weight is trained
    alpha: float = 32.0  # an adapter adds alpha / rank times its product
    targets: tuple[str, ...] = LINEARS  # linears that get one, by their Hugging Face names
    tokens: Literal["template", "none"] = "template"  # train the template's tokens' rows of embedding and head too


@dataclass(frozen=True)
class ParallelConfig:
    """`shard` ranks hold one copy of the model between them; `replicate` such groups work side by side.

    reshard, when gathered weights are let go: "block", after each block's forward and again after its backward; "step",
    after the step's last backward, which gathers once a step and holds 2 bytes a parameter of the whole model.
    reduce, when ranks sum their gradients: once a "step", the least traffic, and each holds 4 bytes a parameter of the
    whole model; or each "micro_batch", and each holds those of its shard.
    offload, what waits in host memory: the "optimizer"'s moments, which come to the card for each update; or "all",
    weights too, with the update on the host (more than one process). true and false mean all and none.
    """

    shard: int = 0  # 0: all ranks that replicate leaves
    replicate: int = 1  # groups side by side, each with a copy of the model
    reshard: Literal["auto", "block", "step"] = "auto"  # weights stay gathered for each; auto: a block on CUDA
    reduce: Literal["step", "micro_batch"] = "step"  # when ranks sum gradients; until then each keeps whole ones
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of that sum; bfloat16 needs "micro_batch"
    offload: Literal["none", "optimizer", "all"] | bool = "none"  # to the host: the "optimizer"'s moments, or "all"
    timeout_s: float = 600.0  # a step or evaluation that makes no progress for so long ends the run, with who is where

    def __post_init__(self) -> None:
        if isinstance(self.offload, bool):
            object.__setattr__(self, "offload", "all" if self.offload else "none")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and how many of its checkpoints stay."""

    every: int = 0  # steps between checkpoints; 0: at the end of every epoch
    keep: int = 2  # newest checkpoints that are kept; 0: all
    keep_every: int = 0  # besides, those after a multiple of so many steps are kept for good; 0: none
    keep_best: bool = False  # besides, the one with the lowest held-out loss of the class with the highest weight


@dataclass(frozen=True)
class SamplesConfig:
    """Prompts that are answered at every evaluation, each under each condition."""

    prompts: tuple[str, ...] = ()  # user messages
    conditions: tuple[str, ...] = ()  # empty: every class of the data
    max_new_tokens: int = 64  # longest answer


@dataclass(frozen=True)
class LogConfig:
    """Trackers beside metrics.jsonl."""

    tensorboard: bool = False  # events in RUN/tensorboard
    wandb: str = ""  # a Weights & Biases project; empty: off


@dataclass(frozen=True)
class Config:
    """All sections of a run."""

    run: RunConfig = RunConfig()
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    classes: dict[str, ClassConfig] = field(default_factory=dict)
    weights: WeightsConfig = WeightsConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    log: LogConfig = LogConfig()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path` after `--section.key=value` options.

    Raises: ConfigError that names what is wrong.
    """
    tree = read(path, overrides)
    if ABLATE in tree:
        raise ConfigError(f"{path}: has a section [{ABLATE}], which is for `ochat ablate {path}`; leave it out")
    return from_tree(tree)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The file's tables after the options, as yet unchecked. Raises: ConfigError for what is no TOML, or no option."""
    tree = typed_toml.read(Path(path))
    for option in overrides:
        typed_toml.apply(tree, option)
    return tree


def from_tree(tree: dict[str, Any]) -> Config:
    """The configuration that tables of TOML say. Raises: ConfigError that names what is wrong."""
    config = typed_toml.build(Config, tree)
    _check(config)
    return config


def dump(config: Config) -> str:
    """The configuration as TOML, every value resolved; `load` reads it back to an equal `Config`."""
    blocks = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if section.name == "classes":
            blocks += [typed_toml.section(("classes", name), entry) for name, entry in value.items()]
        else:
            blocks.append(typed_toml.section((section.name,), value))
    return "\n".join(blocks)


_POSITIVE = (
    "data.token_budget data.bins_per_step data.epochs weights.beta train.log_every parallel.replicate optim.eps "
    "parallel.timeout_s"
)
_NOT_NEGATIVE = (
    "data.max_steps optim.weight_decay optim.clip train.eval_every train.peak_tflops train.max_nonfinite_steps "
    "parallel.shard "
    "checkpoint.every checkpoint.keep checkpoint.keep_every samples.max_new_tokens run.seed lora.rank"
)
_SHARES = "optim.warmup_ratio optim.min_lr_ratio"


def _check(config: Config) -> None:
    """Refuses values that have the right type and no meaning."""
    for name in (_POSITIVE + " " + _NOT_NEGATIVE + " " + _SHARES).split():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        expect(math.isfinite(value) and value >= 0, name, value, "a number that is not negative")
        expect(value > 0 or name not in _POSITIVE.split(), name, value, "a number above 0")
        expect(value <= 1 or name not in _SHARES.split(), name, value, "a share between 0 and 1")
    for i, beta in enumerate(config.optim.betas):
        expect(0 <= beta < 1, f"optim.betas[{i}]", beta, "a number in [0, 1)")
    if isinstance(config.optim.lr, float):
        expect(math.isfinite(config.optim.lr) and config.optim.lr > 0, "optim.lr", config.optim.lr, "a number above 0")
    for name, share in config.data.subsample.items():
        expect(0 < share <= 1, f"data.subsample.{name}", share, "a share in (0, 1]")
    for name, entry in config.classes.items():
        given = {key: value for key, value in dataclasses.asdict(entry).items() if value is not None}
        expect((entry.reward is None) != (entry.weight is None), f"classes.{name}", given, "either reward or weight")
    is_measured = bool(config.data.eval_path) or not config.checkpoint.keep_best
    expect(is_measured, "checkpoint.keep_best", True, "false without data.eval_path: nothing would be measured")
    _check_mix(config.data)
    _check_memory(config)
    _check_optim(config)
    _check_lora(config.lora)
    for name in ("base.path", "data.path", "run.dir"):
        section, key = name.split(".")
        is_needed = name != "data.path" or not config.data.mix
        given = bool(getattr(getattr(config, section), key))
        expect(given or not is_needed, name, "", f"a path, for example --{name}=PATH")


def _check_memory(config: Config) -> None:
    offloads, recompute = config.train.offload_activations, config.train.recompute
    is_kept = not offloads or recompute in ("auto", "block")
    why = f'false beside train.recompute = "{recompute}", which keeps more than inputs'
    expect(is_kept, "train.offload_activations", offloads, why)
    reduce, dtype = config.parallel.reduce, config.parallel.reduce_dtype
    is_exact = dtype == "float32" or reduce == "micro_batch"  # else micro-batches would be added up in bfloat16
    expect(is_exact, "parallel.reduce_dtype", dtype, '"float32" beside parallel.reduce = "step"')


def _check_optim(config: Config) -> None:
    """Choices of precision and of the time of the update that would not do what they say."""
    optim, parallel = config.optim, config.parallel
    if optim.master_dtype == "bfloat16":
        fine = config.train.dtype == "bfloat16"
        expect(fine, "optim.master_dtype", optim.master_dtype, '"float32" beside train.dtype = "float32"')
        fine = config.lora.rank == 0
        expect(
            fine, "optim.master_dtype", optim.master_dtype, '"float32" beside lora.rank: frozen weights have no masters'
        )
        fine = parallel.reduce == "step"  # a shard's gradient is bfloat16
        expect(
            fine,
            "optim.master_dtype",
            optim.master_dtype,
            '"float32" beside parallel.reduce = "micro_batch", which adds up',
        )
    for key in ("master_dtype", "moment_dtype"):
        value = getattr(optim, key)
        fine = value == "float32" or parallel.offload != "all"
        expect(fine, f"optim.{key}", value, '"float32" beside parallel.offload = "all", which updates on the host')
    if optim.in_backward:
        expect(optim.clip == 0, "optim.clip", optim.clip, "0 beside optim.in_backward: the norm is known too late")
        for name, most in (("data.bins_per_step", 1), ("train.max_nonfinite_steps", 0), ("lora.rank", 0)):
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            expect(value == most, name, value, f"{most} beside optim.in_backward")


def _check_lora(lora: LoraConfig) -> None:
    expect(math.isfinite(lora.alpha) and lora.alpha > 0, "lora.alpha", lora.alpha, "a number above 0")
    expect(bool(lora.targets), "lora.targets", lora.targets, "at least one linear; rank = 0 trains without adapters")
    for name in lora.targets:
        expect(name in LINEARS, "lora.targets", name, f"some of {', '.join(LINEARS)}")


def _check_mix(data: DataConfig) -> None:
    expect(not (data.path and data.mix), "data.path", data.path, "no path beside [data.mix]; make it a set of its own")
    for name, share in data.mix.items():
        where = f"data.mix.{name}"
        expect(bool(share.path), f"{where}.path", "", "the folder of a data set")
        given = {key: getattr(share, key) for key in ("epochs", "tokens", "ratio") if getattr(share, key) is not None}
        expect(len(given) <= 1, where, given, "at most one of epochs, tokens and ratio")
        for key, value in given.items():
            expect(math.isfinite(value) and value > 0, f"{where}.{key}", value, "a number above 0")
