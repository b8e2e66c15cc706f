"""Configuration: a TOML file plus `--section.key=value` options become one frozen `Config`.

    config = load("configs/demo.toml", ["--optim.lr=2e-5", "--run.dir=runs/a"])

Each section is a frozen struct whose keys carry their type, bounds, default and explanation. An unknown key, a wrong
type or an impossible value is a ConfigError that names the key, the value, what was expected and the nearest known key.
`dump(config)` is TOML again; the run folder keeps it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta, Struct

from ochat import overrides
from ochat.errors import ConfigError
from ochat.overrides import expect

ABLATE = "ablate"  # a section that only `ochat ablate` reads
HELD_OUT = "held_out"  # the set of data.eval_path, beside the names of [eval]
MAX_INT, MAX_FLOAT = 2**63 - 1, 1.7976931348623157e308

Count = Annotated[int, Meta(ge=0, le=MAX_INT)]
AtLeastOne = Annotated[int, Meta(gt=0, le=MAX_INT)]
Bins = Annotated[int, Meta(gt=0, le=1 << 20)]  # a run counts those of a step, and the epochs, one by one
Epochs = Annotated[int, Meta(gt=0, le=10_000)]
BinTokens = Annotated[int, Meta(gt=0, le=1 << 24)]
Positive = Annotated[float, Meta(gt=0, le=MAX_FLOAT)]
NotNegative = Annotated[float, Meta(ge=0, le=MAX_FLOAT)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
Precision = Literal["bfloat16", "float32"]
Recompute = Literal["auto", "none", "elementwise", "block"]
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

RENAMED = {  # keys of earlier versions, `*` for a table's name
    "run.resume_anyway": "resume_mismatched",
    "train.max_bad_steps": "max_nonfinite_steps",
    "optim.master": "master_dtype",
    "optim.state": "moment_dtype",
    "data.mix.*.rate": "ratio",
}
ELSEWHERE = {  # keys of other trainers -> ours
    "learning_rate": "optim.lr", "max_grad_norm": "optim.clip", "warmup_steps": "optim.warmup_ratio",
    "batch_size": "data.bins_per_step", "per_device_train_batch_size": "data.token_budget",
    "gradient_accumulation_steps": "data.bins_per_step", "max_seq_length": "data.token_budget",
    "max_length": "data.token_budget", "num_train_epochs": "data.epochs", "num_epochs": "data.epochs",
    "gradient_checkpointing": "train.recompute", "bf16": "train.dtype",
    "output_dir": "run.dir", "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep", "logging_steps": "train.log_every", "eval_steps": "train.eval_every",
    "model_name_or_path": "base.path", "lora_r": "lora.rank", "lora_alpha": "lora.alpha",
}  # fmt: skip
RENAMED_VALUES = {("train.attention", "flash2"): "flash"}  # those of earlier versions


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections."""


class RunConfig(Section, frozen=True):
    """Where a run lives and how it starts."""

    dir: str = "runs/default"
    """the run folder: config, metrics, checkpoints"""
    seed: Count = 0
    """decides the order of the data and every random draw"""
    deterministic: bool = False
    """bitwise reproducible on the same machine and number of processes; slower on CUDA"""
    resume: str = "auto"
    """auto: from the newest whole checkpoint in run.dir, if any; never; or the path of a checkpoint"""
    resume_mismatched: bool = False
    """resume even if template, data set or data order differ from the checkpoint's"""


class BaseConfig(Section, frozen=True):
    """The model that is fine-tuned."""

    path: str = ""
    """a Hugging Face folder with safetensors"""
    quantize: Literal["none", "nf4"] = "none"
    """with lora.rank, how the frozen linears of the blocks are held. nf4: 4 bits a weight, with double quantisation,
    by bitsandbytes; the export merges into the base as it is in its folder"""


class MixConfig(Section, frozen=True):
    """One of several data sets, and what an epoch takes of it: at most one of epochs, tokens and ratio."""

    path: str | tuple[str, ...] = ""
    """a folder written by `ochat prepare`, or a list of them"""
    epochs: Positive | None = None
    """passes over it per epoch; 0.5: another half each time; without epochs, tokens and ratio: 1"""
    tokens: AtLeastOne | None = None
    """number of its tokens per epoch"""
    ratio: Positive | None = None
    """its tokens relative to the other sets with a ratio, until the first of them is used up"""


class DataConfig(Section, frozen=True):
    """What is trained on, and how it is cut into steps."""

    path: str | tuple[str, ...] = ""
    """a folder written by `ochat prepare`, or a list: the shards of `prepare --shard i/n`, joined in order"""
    mix: dict[str, MixConfig] = {}
    """several data sets instead of path: [data.mix.NAME]"""
    eval_path: str | tuple[str, ...] = ""
    """a held-out folder of the same kind, or a list; empty: no evaluation"""
    verify: bool = True
    """compare every file with its checksum at the start; about 1 s a GB, shared by the processes"""
    token_budget: BinTokens = 8192
    """tokens in a bin; a bin is one micro-batch"""
    bins_per_step: Bins = 8
    """bins in an optimizer step, over all processes"""
    epochs: Epochs = 1
    """passes over the data"""
    max_steps: Count = 0
    """stop after this many steps; 0: all epochs"""
    only_class: str = ""
    """train on this class only (the paper's "only expert" and "only sub-optimal")"""
    subsample: dict[str, PositiveShare] = {}
    """class -> share of its conversations that is kept: [data.subsample]"""


class ClassConfig(Section, frozen=True):
    """The weight of one class's answers: `weight`, or `exp((reward - 1) / beta)`. Give exactly one of reward and
    weight."""

    reward: float | None = None
    """1 for the experts, less for the others"""
    weight: float | None = None
    """loss weight of the class's answers, instead of a reward"""
    beta: Positive | None = None
    """for this class's reward; without it: weights.beta"""


class WeightsConfig(Section, frozen=True):
    """Where the loss weight of a supervised message comes from."""

    source: Literal["auto", "record", "classes", "reward", "none"] = "auto"
    """record: the record's own weights; classes: the [classes] table; reward: each conversation's `reward` field;
    none: every supervised token weighs 1; auto: classes if there is that table, else record"""
    beta: Positive = 0.9 / math.log(10)
    """temperature of rewards; the default turns rewards 1 and 0.1 into the paper's weights 1 and 0.1"""
    per_message_mean: bool = False
    """divide a message's weight by its number of tokens"""
    per_conversation_mean: bool = False
    """divide a conversation's weights by its number of supervised tokens, so that long ones count no more"""


class ConditionConfig(Section, frozen=True):
    """When a conversation is trained without its condition, or under another."""

    dropout: Share = 0.0
    """share of the conversations, drawn anew for each epoch, that are trained without condition"""
    last: Share = 0.0
    """share of the run's steps, the last ones, that are wholly without condition"""
    goals: Literal["own", "at_least"] = "own"
    """at_least: each conversation under a class drawn from its own and the lower ones, anew for each epoch; for data of
    `ochat prepare --condition-from reward`"""


class DynamicConfig(Section, frozen=True):
    """How the model's own probabilities change the weights of tokens."""

    dynamic: Literal["none", "dft", "eaft", "unlikelihood"] = "none"
    """dft: times the label's probability; eaft: times the entropy, where it is below that of 20 equal choices;
    unlikelihood: a negative weight w costs |w| * -log(1 - p) in place of w * -log p, which has no lower bound"""
    eaft_alpha: Positive = 1.0
    """exponent of eaft's factor"""


class StageConfig(DynamicConfig, frozen=True):
    """The same keys, in place of those of [loss], for the last part of a run."""

    from_: Share = msgspec.field(default=1.0, name="from")
    """share of the run's steps after which they apply, such as 0.8; 1: never"""


class LossConfig(DynamicConfig, frozen=True):
    """How the model's own probabilities change the weights of tokens. The loss is divided by the sum of the weights
    without it."""

    stage2: StageConfig = StageConfig()
    """other keys for the last part of the run: [loss.stage2]"""


class OptimConfig(Section, frozen=True):
    """AdamW, clipping and the learning-rate schedule (linear warm-up, then cosine)."""

    lr: Positive | Literal["auto"] = "auto"
    """peak learning rate; auto: from the supervised tokens of a step"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """of AdamW"""
    eps: Positive = 1e-5
    """of AdamW"""
    weight_decay: NotNegative = 0.1
    """of matrices; norms and biases have none"""
    clip: NotNegative = 1.0
    """largest gradient norm; 0: no clipping"""
    master_dtype: Precision = "float32"
    """of the weights that are updated; bfloat16: stochastic rounding"""
    moment_dtype: Precision = "float32"
    """of AdamW's two moments; bfloat16: stochastic rounding"""
    in_backward: bool = False
    """update each weight as soon as its gradient is complete, so that no gradients are held; one process only"""
    ema: Beta = 0.0
    """share of a moving average of the weights, in fp32, that stays at each step, for `ochat export --ema`; 0.999 is
    usual, 0: no average"""
    warmup_ratio: Share = 0.05
    """share of the steps in which the rate rises"""
    min_lr_ratio: Share = 0.1
    """share of the peak at which the cosine ends"""


class TrainConfig(Section, frozen=True):
    """How a step is computed, and how often it is reported."""

    dtype: Precision = "bfloat16"
    """of activations and matrix products; weights: optim.master_dtype"""
    linear: Literal["bf16", "fp8"] = "bf16"
    """products of the blocks' linears. fp8: forward and gradients of inputs in e4m3 with a scale for each row, on
    Hopper GPUs or newer; weights, their gradients, embedding and head stay as they are"""
    kernels: Literal["auto", "triton", "compiled", "reference"] = "auto"
    """of norms, RoPE, SwiGLU and the loss. triton: for CUDA; compiled: for a CPU with a C++ compiler; reference: plain
    PyTorch; auto: triton on CUDA, elsewhere compiled for a run of some minutes, else reference"""
    attention: Literal["auto", "flash", "fa3", "fa4", "cudnn", "varlen", "flex", "sdpa"] = "auto"
    """auto: on CUDA the fastest of those that are installed and pass a test at start, on a CPU sdpa"""
    recompute: Recompute = "auto"
    """activation checkpointing: elementwise recomputes norm, RoPE and SwiGLU, block a whole block; auto: the least that
    fits in memory"""
    offload_activations: bool = False
    """keep the inputs of blocks in host memory and recompute everything else"""
    compile: bool = False
    """torch.compile, block by block"""
    log_every: AtLeastOne = 1
    """steps between two reads of the metrics from the device"""
    max_nonfinite_steps: Count = 0
    """steps with a NaN or infinite loss or gradient that a run skips, restarts included; one more ends it"""
    eval_every: Count = 0
    """steps between held-out evaluations; 0: at the end of every epoch"""
    stop_after: Count = 0
    """end the run after so many evaluations in a row that are no better than the best before (checkpoint.best); 0:
    never"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if there is a GPU"""
    peak_tflops: NotNegative = 0.0
    """the peak that mfu refers to; 0: from the GPU's data sheet, or timed at start"""


class LoraConfig(Section, frozen=True):
    """Low-rank adapters over frozen weights instead of training every weight."""

    rank: Count = 0
    """of each adapter, 16 is usual; 0: off, every weight is trained"""
    alpha: Positive = 32.0
    """an adapter adds alpha / rank times its product"""
    targets: Annotated[tuple[Linear, ...], Meta(min_length=1)] = LINEARS
    """linear layers that get an adapter, by their Hugging Face names"""
    tokens: Literal["template", "none"] = "template"
    """also train the rows of the template's tokens in embedding and head"""


class ParallelConfig(Section, frozen=True):
    """How processes share the model: `shard` of them hold one copy together, `replicate` such groups work in
    parallel."""

    shard: Count = 0
    """processes that share one copy of the model; 0: all / replicate"""
    replicate: AtLeastOne = 1
    """groups, each with a copy of the model"""
    reshard: Literal["auto", "block", "step"] = "auto"
    """when gathered weights are freed. block: after each block's forward and backward; step: after the last backward of
    the step, which gathers once a step and holds 2 bytes a parameter of the whole model; auto: block on CUDA"""
    reduce: Literal["auto", "step", "micro_batch"] = "auto"
    """when gradients are summed over processes. step: least traffic, each holds 4 bytes a parameter of the whole model;
    micro_batch: each holds those of its shard; auto: within a node the faster of those that fit, as `ochat plan`
    predicts, else step"""
    reduce_dtype: Precision = "float32"
    """of that sum; bfloat16 needs micro_batch"""
    offload: Literal["none", "optimizer", "all"] | bool = "none"
    """what lives in host memory. optimizer: AdamW's moments, which come to the GPU for each update; all: weights too,
    updated on the host (several processes only); true and false mean all and none"""
    timeout_s: Positive = 600.0
    """end the run if a step or evaluation makes no progress for this long, and say where each process is"""

    def __post_init__(self) -> None:
        if isinstance(self.offload, bool):
            msgspec.structs.force_setattr(self, "offload", "all" if self.offload else "none")


class CheckpointConfig(Section, frozen=True):
    """When the run is saved, and how many of its checkpoints are kept."""

    every: Count = 0
    """steps between checkpoints; 0: at the end of every epoch"""
    keep: Count = 2
    """newest checkpoints that are kept; 0: all"""
    keep_every: Count = 0
    """also keep the checkpoints after every multiple of this many steps; 0: none"""
    best: str = ""
    """what decides which one is the best: SET.loss, SET.accuracy or SET.exact, and .CLASS for one class, such as
    held_out.loss.GPT4, where SET is held_out (data.eval_path) or a name of [eval]; empty: the held-out loss of the
    class with the highest weight"""
    keep_best: bool = False
    """also keep the best one"""


class SamplesConfig(Section, frozen=True):
    """Prompts that are answered at every evaluation, each under each condition."""

    prompts: tuple[str, ...] = ()
    """user messages"""
    conditions: tuple[str, ...] = ()
    """empty: every class of the data"""
    max_new_tokens: Count = 64
    """longest answer"""


class EvalConfig(Section, frozen=True):
    """A further held-out set, measured at every evaluation."""

    path: str | tuple[str, ...] = ""
    """a folder written by `ochat prepare`, or a list; with task exact: files of conversations, which end with the right
    answer"""
    task: Literal["loss", "exact"] = "loss"
    """loss: loss and accuracy, both per class; exact: the share of prompts whose greedy answer is the right one, blanks
    around it left out"""
    conditions: tuple[str, ...] = ()
    """with task exact, the classes that answer; empty: the one that the model is served as"""
    max_new_tokens: AtLeastOne = 64
    """with task exact, the longest answer, its end included"""


class LogConfig(Section, frozen=True):
    """Trackers in addition to metrics.jsonl."""

    tensorboard: bool = False
    """events in RUN/tensorboard"""
    wandb: str = ""
    """a Weights & Biases project; empty: off"""


class Config(Section, frozen=True):
    """All sections of a run."""

    run: RunConfig = RunConfig()
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    classes: dict[str, ClassConfig] = {}
    weights: WeightsConfig = WeightsConfig()
    condition: ConditionConfig = ConditionConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: dict[str, EvalConfig] = {}
    samples: SamplesConfig = SamplesConfig()
    log: LogConfig = LogConfig()


def load(path: str | Path, options: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path` after `--section.key=value` options.

    Raises: ConfigError that names what is wrong.
    """
    tree = read(path, options)
    if ABLATE in tree:
        raise ConfigError(f"{path}: has a section [{ABLATE}], which is for `ochat ablate {path}`; leave it out")
    return from_tree(tree)


def read(path: str | Path, options: Sequence[str] = (), schema: Any = Config) -> dict[str, Any]:
    """The file's tables after the options, not yet checked. Raises: ConfigError for invalid TOML or options."""
    tree = overrides.read_toml(Path(path))
    for option in options:
        overrides.apply(tree, option, schema)
    return tree


def from_tree(tree: dict[str, Any]) -> Config:
    """The configuration that tables of TOML hold. Raises: ConfigError that names what is wrong."""
    try:
        config = overrides.build(Config, with_new_names(tree))
    except overrides.UnknownKey as error:
        section, _, name = error.name.rpartition(".")
        fields = msgspec.structs.fields(Config)
        same = (f"{each.name}.{name}" for each in fields if name in getattr(each.type, "__struct_fields__", ()))
        if not section or not (wanted := ELSEWHERE.get(name) or next(same, "")):
            raise
        raise ConfigError(f"unknown key {error.name!r}; did you mean --{wanted}?") from None
    _check(config)
    return config


def with_new_names(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The tables of a configuration with the keys and values of earlier versions under their new names."""
    changed = {}
    for key, value in tree.items():
        new = next((new for old, new in RENAMED.items() if fnmatchcase(where + key, old)), key)
        if isinstance(value, dict) and where.count(".") < 3:  # a file may nest tables without end
            value = with_new_names(value, f"{where}{key}.")
        elif isinstance(value, str):
            value = RENAMED_VALUES.get((where + new, value), value)
        changed[new] = value
    return changed


def dump(config: Config) -> str:
    """The configuration as TOML, every value resolved; `load` reads it back to an equal `Config`."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(config)))


def explanations(section: type[Section]) -> dict[str, str]:
    """What each key of a section is for: the docstrings after its keys, by their names in a file."""
    source = "\n".join(inspect.getsource(kind) for kind in reversed(section.__mro__) if issubclass(kind, Section))
    found = re.findall(r'^    (\w+?)_?: .*\n    """((?:.|\n)*?)"""', source, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a file's tables with its dotted name; an empty table is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: a missing key is None. Empty tables are left out too."""
    pruned = {key: _without_none(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in pruned.items() if value is not None and value != {}}


def _check(config: Config) -> None:
    """Refuses values that are valid on their own and impossible together."""
    for name, entry in config.classes.items():
        given = _without_none(msgspec.structs.asdict(entry))
        expect((entry.reward is None) != (entry.weight is None), f"classes.{name}", given, "either reward or weight")
    for name, share in config.data.mix.items():
        where, given = f"data.mix.{name}", _without_none(msgspec.structs.asdict(share))
        expect(bool(given.pop("path")), f"{where}.path", "", "the folder of a data set")
        expect(len(given) <= 1, where, given, "at most one of epochs, tokens and ratio")
    for name, entry in config.eval.items():
        expect(name not in ("", HELD_OUT), "eval", name, f"another name than {HELD_OUT}, which data.eval_path has")
        expect(bool(entry.path), f"eval.{name}.path", "", "a data set, or for task exact a file of conversations")
        is_unused = entry.task != "exact" and entry.conditions
        expect(not is_unused, f"eval.{name}.conditions", entry.conditions, 'none without task = "exact"')
    for key, path in (
        ("base.path", config.base.path), ("data.path", config.data.path or config.data.mix), ("run.dir", config.run.dir)
    ):  # fmt: skip
        expect(bool(path), key, path, f"a path, for example --{key}=PATH")
    for is_bound, key, wanted, why in _rules(config):
        value = attrgetter(key)(config)
        expect(not is_bound or value == wanted, key, value, f"{json.dumps(wanted)} with {why}")


def _rules(config: Config) -> tuple[tuple[bool, str, Any, str], ...]:
    """Where the first holds, the key has the value that follows; and why."""
    in_backward, train, parallel = config.optim.in_backward, config.train, config.parallel
    is_measured = bool(config.data.eval_path or config.checkpoint.best)
    nothing = "no data.eval_path and no checkpoint.best: nothing would be measured"
    is_unlikelihood = "unlikelihood" in (config.loss.dynamic, config.loss.stage2.dynamic)
    rows = 'lora.rank and loss.dynamic = "unlikelihood", whose gradient to single rows of the head is not exact'
    keeps_more = f'train.recompute = "{train.recompute}", which keeps more than inputs'
    on_host = 'parallel.offload = "all", which updates on the host'
    summed = 'parallel.reduce = "micro_batch", which sums in the gradient\'s bfloat16'
    return (
        (bool(config.data.mix), "data.path", "", "[data.mix]; make it a set of the mix"),
        (not is_measured, "checkpoint.keep_best", False, nothing),
        (not is_measured, "train.stop_after", 0, nothing),
        (train.recompute in ("none", "elementwise"), "train.offload_activations", False, keeps_more),
        (parallel.reduce == "step", "parallel.reduce_dtype", "float32", 'parallel.reduce = "step"'),
        (train.linear == "fp8", "train.dtype", "bfloat16", 'train.linear = "fp8"; or set train.linear = "bf16"'),
        (train.linear == "fp8", "train.compile", False, 'train.linear = "fp8", whose kernels are fused as they are'),
        (config.lora.rank == 0, "base.quantize", "none", "lora.rank = 0: only frozen weights can be quantised"),
        (train.linear == "fp8", "base.quantize", "none", 'train.linear = "fp8", which reads weights in bfloat16'),
        (train.compile, "base.quantize", "none", "train.compile = true"),
        (train.dtype == "float32", "optim.master_dtype", "float32", 'train.dtype = "float32"'),
        (config.lora.rank > 0, "optim.master_dtype", "float32", "lora.rank: frozen weights have no masters"),
        (parallel.reduce == "micro_batch", "optim.master_dtype", "float32", summed),
        (parallel.reduce_dtype == "bfloat16", "optim.master_dtype", "float32", 'parallel.reduce_dtype = "bfloat16"'),
        (parallel.offload == "all", "optim.master_dtype", "float32", on_host),
        (parallel.offload == "all", "optim.moment_dtype", "float32", on_host),
        (config.loss.stage2.from_ == 1, "loss.stage2.dynamic", "none", "no loss.stage2.from: give it, such as 0.8"),
        (config.lora.rank > 0 and is_unlikelihood, "lora.tokens", "none", rows),
        (config.weights.per_conversation_mean, "weights.per_message_mean", False, "weights.per_conversation_mean"),
        (in_backward, "optim.clip", 0, "optim.in_backward: the norm is known too late"),
        (in_backward, "data.bins_per_step", 1, "optim.in_backward"),
        (in_backward, "train.max_nonfinite_steps", 0, "optim.in_backward"),
        (in_backward, "lora.rank", 0, "optim.in_backward"),
        (in_backward, "optim.ema", 0, "optim.in_backward: weights change before it is known whether the step counts"),
    )
