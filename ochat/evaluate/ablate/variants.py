"""The [ablate] section, the paper's variants, and the training configuration of each run.

    base, options = read_config("small.toml", ["--ablate.jobs=2"]);  runs(base, options)[0].config

The file is a training configuration with the additional section [ablate]. A run's configuration adds the variant's
switches and the seed. It takes exactly as many tokens of the data as its steps have room for: a small class is repeated
more often, so that every variant makes the same number of full steps.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from ochat import config as configuration
from ochat import overrides
from ochat.config import ABLATE, AtLeastOne, ConditionConfig, Config, Count, MixConfig, Section
from ochat.errors import ConfigError
from ochat.overrides import expect

VariantName = Literal["c-rlft", "no-reward", "no-condition", "sft", "only-expert", "only-suboptimal"]
OURS = "c-rlft"  # with which the others are compared
SEED = "{seed}"
# keys that `ochat ablate` sets for each run
SET_HERE = {
    "run": ("dir", "seed", "resume", "resume_mismatched"),
    "data": ("path", "mix", "eval_path", "epochs", "only_class", "subsample"),
}


@dataclass(frozen=True)
class Variant:
    """One row of the paper's table: what is switched off, left out or thinned."""

    name: str
    title: str
    has_condition: bool = True  # else the data is prepared with --conditions ignore
    has_reward: bool = True  # else weights.source = "none"
    only: str = ""  # data.only_class
    subsample: Mapping[str, float] = field(default_factory=dict)  # data.subsample


class AblateConfig(Section, frozen=True):
    """The ablation: data, classes, and which runs are made. In input, held_out and base.path, {seed} is replaced by
    the run's seed, for data or a base that each seed draws for itself."""

    dir: str = ""
    """its folder: data, runs, results.jsonl, table.json, table.md"""
    input: tuple[str, ...] = ()
    """files or folders of conversations, as `ochat prepare` reads them"""
    template: str = ""
    """a template's name or file"""
    held_out: tuple[str, ...] | float = ()
    """files of held-out conversations, or the share of the prompts held out"""
    expert: str = "GPT4"
    """the class whose answers are wanted"""
    suboptimal: str = "GPT3"
    """the other class"""
    seeds: tuple[Count, ...] = (0, 1, 2, 3, 4)
    """of the order of the data; each variant is trained once with each"""
    variants: tuple[VariantName, ...] = typing.get_args(VariantName)
    """rows of the table"""
    subsample: tuple[float, ...] = ()
    """shares of either class, such as [0.6, 0.8]; each adds a C-RLFT run"""
    jobs: AtLeastOne = 1
    """processes at a time; on CUDA each has one device"""
    context: int | None = None
    """tokens that a conversation may have; without it: the template's"""
    limit: AtLeastOne | None = None
    """held-out conversations of each class that are measured; without it: all"""
    keep_checkpoints: bool = False
    """keep them once a run is measured; its export is kept in any case"""


class AblationFile(Config, frozen=True):
    """A training configuration with one section more."""

    ablate: AblateConfig = AblateConfig()


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed."""

    variant: Variant
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.variant.name}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """What its training writes."""
        return Path(self.config.run.dir)

    @property
    def data(self) -> Path:
        """The prepared set that it reads."""
        return Path(str(self.config.data.mix["all"].path))


def read_config(path: str | Path, options: Sequence[str] = ()) -> tuple[Config, AblateConfig]:
    """The training configuration that all runs share, and the ablation's options. Raises: ConfigError naming a key."""
    tree = configuration.read(path, options, AblationFile)
    if ABLATE not in tree:
        raise ConfigError(f"{path}: has no section [{ABLATE}]: `ochat ablate --help` says what it holds")
    settings = overrides.build(AblateConfig, tree.pop(ABLATE), ABLATE)
    for section, keys in SET_HERE.items():
        for key in keys:
            if key in tree.get(section, {}):
                raise ConfigError(f"{section}.{key}: `ochat ablate` sets it for each of its runs; leave it out")
    if isinstance(data := tree.setdefault("data", {}), dict):
        data["path"] = "set for each run"  # a configuration needs one, or a mix
    base = configuration.from_tree(tree)
    _check(base, settings)
    return base, settings


def variants(options: AblateConfig) -> list[Variant]:
    """Those asked for in the paper's order; then C-RLFT on a part of either class."""
    paper = (
        Variant(OURS, "C-RLFT"),
        Variant("no-reward", "without reward", has_reward=False),
        Variant("no-condition", "without condition", has_condition=False),
        Variant("sft", "only SFT", has_condition=False, has_reward=False),
        Variant("only-expert", f"only {options.expert}", only=options.expert),
        Variant("only-suboptimal", f"only {options.suboptimal}", only=options.suboptimal),
    )
    thinned = (
        Variant(f"{OURS}-{side}-{share:g}", f"C-RLFT, {share:.0%} of {name}", subsample={name: share})
        for side, name in (("expert", options.expert), ("suboptimal", options.suboptimal))
        for share in options.subsample
    )
    return [variant for variant in paper if variant.name in options.variants] + list(thinned)


def runs(base: Config, options: AblateConfig) -> list[Run]:
    """Every variant with every seed, seed by seed: the first row of all variants is there early."""
    return [
        Run(variant, seed, _config(base, options, variant, seed))
        for seed in options.seeds
        for variant in variants(options)
    ]


def held_out(options: AblateConfig) -> tuple[tuple[str, ...], float]:
    """The held-out files, and the share of the input that is held out where there are none."""
    return ((), float(options.held_out)) if isinstance(options.held_out, float | int) else (options.held_out, 0.0)


def of_seed(text: str, seed: int) -> str:
    """A path with the seed in the place of {seed}."""
    return text.replace(SEED, str(seed))


def _config(base: Config, options: AblateConfig, variant: Variant, seed: int) -> Config:
    data, folder = base.data, Path(options.dir)
    tokens = data.max_steps * data.bins_per_step * data.token_budget
    is_drawn = any(SEED in text for text in (base.base.path, *options.input, *held_out(options)[0]))
    name = "condition" if variant.has_condition else "plain"
    path = folder / "data" / (f"seed{seed}-{name}" if is_drawn else name)
    return replace(
        base,
        run=replace(base.run, dir=str(folder / "runs" / f"{variant.name}-seed{seed}"), seed=seed),
        base=replace(base.base, path=of_seed(base.base.path, seed)),
        data=replace(
            data,
            path="",
            mix={"all": MixConfig(str(path), tokens=tokens)},
            only_class=variant.only,
            subsample=dict(variant.subsample),
        ),
        weights=base.weights if variant.has_reward else replace(base.weights, source="none"),
        condition=base.condition if variant.has_condition else ConditionConfig(),
    )


def _check(base: Config, options: AblateConfig) -> None:
    """Raises: ConfigError for options that make no fair comparison."""
    for key, example in (("dir", '"ablations/mine"'), ("input", '["chats.jsonl"]'), ("template", '"openchat_v3.2"')):
        value = getattr(options, key)
        expect(bool(value), f"{ABLATE}.{key}", value, f"a value, such as {example}")
    files, share = held_out(options)
    why = "files of held-out conversations, or a share such as 0.05"
    expect(bool(files) or 0 < share < 1, f"{ABLATE}.held_out", options.held_out, why)
    expect(bool(options.expert), f"{ABLATE}.expert", options.expert, "the name of a class")
    is_other = options.suboptimal not in ("", options.expert)
    expect(is_other, f"{ABLATE}.suboptimal", options.suboptimal, "the name of another class than the expert's")
    for key in ("seeds", "variants"):
        value = getattr(options, key)
        expect(0 < len(value) == len(set(value)), f"{ABLATE}.{key}", value, "at least one, each once")
    for share in options.subsample:
        expect(0 < share < 1, f"{ABLATE}.subsample", share, "shares between 0 and 1")
    why = 'a number: "auto" goes by the supervised tokens of a step, which differ between variants'
    expect(isinstance(base.optim.lr, float), "optim.lr", base.optim.lr, why)
    expect(base.data.max_steps > 0, "data.max_steps", base.data.max_steps, "the steps that every run makes")
    expect(not base.eval, "eval", list(base.eval), "none: `ochat ablate` measures all of its runs alike, at their end")
    expect(base.train.stop_after == 0, "train.stop_after", base.train.stop_after, "0: all runs make the same steps")
    why = "weights that differ by class: without them C-RLFT is the variant without reward"
    expect(base.weights.source != "none", "weights.source", base.weights.source, why)
