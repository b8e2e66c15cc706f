"""The models, settings and conversations on which the whole step is measured, and what the plan predicts for them.

    case = PHASES["ours"][0]; world = make_world(case, Path("work"), torch.device("cuda"), num_steps=20)
The settings fit a GPU of 139 GiB. Weights are random and conversations have log-normal lengths, unless a base and data
are given. Letters as in cases.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ochat_kernels
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from benchmarks import loader
from benchmarks.cases import MODELS, Model
from ochat import config as configuration
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.packing import multipack
from ochat.plan import forecast
from ochat.plan.forecast import Forecast, PlanInputs
from ochat.plan.gpus import GpuSpec
from ochat.plan.lengths import LengthCounts
from ochat.plan.roofline import Workload
from ochat.text import tokenizer as ochat_tokenizers

LAYERS = {"Llama-3-8B": 32, "Llama-2-7B": 32, "Llama-3.2-1B": 16, "Llama-3.2-3B": 28, "tiny": 2, "small": 4}
TIED = ("Llama-3.2-1B", "Llama-3.2-3B")
SMALL_MODELS = {
    "tiny": Model("tiny", H=64, F=96, N=4, K=2, D=16, V=512),
    "small": Model("small", H=256, F=704, N=4, K=2, D=64, V=8192),  # large enough that a CPU's time is in products
}
SHORTEST = 64  # of the drawn conversations; a turn of each side is as long
SCALING_AXES = {"T": "token_budget", "length": "longest", "supervised": "supervised", "processes": "processes"}
PREDICTED_STEPS = 100  # drawn and packed for a prediction
OURS, PEERS = ("ours",), ("ours", "padded", "packed", "liger", "trl")
BF16 = ("--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")
IN_BACKWARD = (*BF16, "--optim.in_backward=true", "--optim.clip=0.0")  # no gradients are held
CLASSES = ("--classes.GPT4.weight=1.0", "--classes.GPT3.weight=0.1")  # the drawn conversations name no weights


END_OF_TURN = "<|end_of_turn|>"  # the template's


@dataclass(frozen=True)
class Peer:
    """How a peer keeps its state."""

    states: str = "masters"  # fp32 parameters and moments, products in bf16 by autocast; or "bf16", all of it
    recompute: bool = False  # transformers' gradient checkpointing


@dataclass(frozen=True)
class Case:
    """One model and micro-batch, and who is measured on it."""

    model: str
    token_budget: int
    bins_per_step: int
    implementations: tuple[str, ...] = OURS
    options: tuple[str, ...] = ()  # of ours: --section.key=value
    peer: Peer = Peer()
    longest: int = 4096  # of the drawn conversations, tokens
    lengths: str = "chats"  # or "equal": every conversation is `longest`
    supervised: float = 0.5  # share of the drawn tokens
    processes: int = 1  # of ours, with one thread each if several

    @property
    def title(self) -> str:
        options = f", {' '.join(self.options)}" if self.options else ""
        return f"{self.model}, {self.bins_per_step} x {self.token_budget}{options}"


# The most important first. Ours recomputes what the plan says it must (train.recompute = "auto"): nothing, except for
# 8B with fp32 masters and for 8B at 32,768 tokens. Tests check that the plan of each fits an H200.
PHASES = {
    "ours": [
        Case("Llama-3-8B", 16384, 1, options=IN_BACKWARD),
        Case("Llama-3.2-1B", 16384, 4),
        Case("Llama-2-7B", 16384, 1, options=IN_BACKWARD),
        Case("Llama-3-8B", 16384, 1),
        Case("Llama-3.2-3B", 16384, 2),
        Case("Llama-3.2-1B", 8192, 8),
        Case("Llama-3.2-1B", 32768, 2),
        Case("Llama-3-8B", 8192, 2, options=BF16),
        Case("Llama-3-8B", 32768, 1, options=IN_BACKWARD),
    ],
    "peers": [
        Case("Llama-3.2-1B", 16384, 2, PEERS),
        Case("Llama-3-8B", 16384, 1, PEERS, IN_BACKWARD, Peer(states="bf16", recompute=True)),
        Case("Llama-3.2-3B", 16384, 1, PEERS, peer=Peer(recompute=True)),
    ],
}
PHASES |= {"first": PHASES["ours"][:1], "chosen": PHASES["ours"][:2]}
QUICK = {
    **{name: [Case("tiny", 512, 1, longest=256)] for name in ("first", "chosen")},
    "ours": [Case("tiny", 512, 2, longest=256)],
    "peers": [Case("tiny", 512, 2, ("ours", "padded", "packed", "liger"), longest=256)],
}


def scaling(*, quick: bool) -> list[list[Case]]:
    """How our step grows: the cases of each axis, which change one thing. Quick: two of each, on the tiny model."""
    middle = Case("tiny", 512, 1, longest=128) if quick else Case("small", 4096, 1, longest=256)
    middle = replace(middle, lengths="equal")
    quarter = replace(middle, token_budget=middle.token_budget // 4, bins_per_step=4)
    every = [
        [replace(middle, token_budget=T) for T in (512, 1024, 2048, 4096, 8192)],
        [replace(middle, longest=n) for n in (SHORTEST, 256, 1024, 4096)],
        [replace(middle, supervised=share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)],
        [replace(quarter, processes=n) for n in (1, 2, 4)],
    ]
    return [cases[:2] for cases in every] if quick else every


@dataclass(frozen=True)
class World:
    """Folders of a base and its data, and the options that belong to them."""

    base: Path
    data: Path
    model: ModelConfig
    options: tuple[str, ...] = ()
    has_weights: bool = True  # in files; otherwise who trains draws them


def options(case: Case, settings: dict[str, Any]) -> list[str]:
    """The `--section.key=value` of a run of the case."""
    cut = {"data.token_budget": case.token_budget, "data.bins_per_step": case.bins_per_step}
    return [*(f"--{key}={value}" for key, value in (settings | cut).items()), *case.options]


def make_world(case: Case, folder: Path, device: torch.device, num_steps: int) -> World:
    """A base with drawn weights and enough drawn conversations for `num_steps`, under `folder`."""
    world = World(folder / "base", folder / "data", model_config(case), CLASSES)
    hf.save(world.base, world.model, draw_parameters(world.model, device), "bfloat16")
    write_bytes_tokenizer(world.base, END_OF_TURN)
    write_data(world, case, num_steps)
    return world


def write_data(world: World, case: Case, num_steps: int) -> None:
    """Enough drawn conversations for `num_steps`."""
    rng = np.random.default_rng(0)
    lengths = draw_lengths(case, rng, (num_steps + 1) * case.bins_per_step * case.token_budget)
    fingerprint = ochat_tokenizers.load(world.base).fingerprint()
    loader.write(
        world.data, lengths, rng, vocab_size=world.model.vocab_size, fingerprint=fingerprint, pair=SHORTEST - 1,
        supervised=case.supervised,
    )  # fmt: skip


def model_config(case: Case) -> ModelConfig:
    """The model of a case as its config.json would have it, without the rotary scaling of long contexts."""
    model = SMALL_MODELS.get(case.model) or MODELS[case.model]
    record = {
        "model_type": "llama", "vocab_size": model.V, "hidden_size": model.H, "intermediate_size": model.F,
        "num_hidden_layers": LAYERS[case.model], "num_attention_heads": model.N,
        "num_key_value_heads": model.K, "head_dim": model.D, "tie_word_embeddings": case.model in TIED,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    return ModelConfig.from_hf(record)


def predict(case: Case, gpu: GpuSpec, gpus: int = 1) -> Forecast:
    """What the plan says of ours: the case's own drawn lengths, packed as the run would pack them."""
    tokens = PREDICTED_STEPS * case.bins_per_step * case.token_budget
    lengths = draw_lengths(case, np.random.default_rng(0), tokens)
    shape = {"token_budget": case.token_budget, "bins_per_step": case.bins_per_step}
    plan = multipack.plan(lengths, **shape, seed=0, epoch=0)
    workload = Workload(LengthCounts.of(lengths), case.supervised, plan.efficiency())
    return forecast.forecast(plan_inputs(case, workload, plan.num_steps), gpu, gpus=gpus, nodes=1)


def plan_inputs(case: Case, workload: Workload, num_steps: int) -> PlanInputs:
    """Of a forecast of ours, on data of which no more than the workload is known."""
    with tempfile.NamedTemporaryFile(suffix=".toml") as empty:
        config = configuration.load(empty.name, options(case, {"base.path": "-", "data.path": "-"}))
    sections = config.data, config.train, config.optim, config.parallel, config.lora, config.base
    return PlanInputs(model_config(case), workload, num_steps, *sections)


def write_bytes_tokenizer(folder: Path, *special: str) -> None:
    """A tokenizer of 256 bytes, BOS, EOS and the `special` tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = '{"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"}'
    (folder / "tokenizer_config.json").write_text(settings, "utf-8")


def draw_parameters(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the host) as Transformer.initialize would draw them, but where randomness is fast."""
    with torch.device("meta"):
        model = Transformer(config, ochat_kernels.load("reference"))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            continue
        drawn = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
        yield name, drawn.mul_(config.initializer_range).cpu()
        del drawn
    if device.type == "cuda":
        torch.cuda.empty_cache()  # leave the memory to what is measured


def draw_lengths(case: Case, rng: np.random.Generator, tokens: int) -> NDArray[np.int64]:
    """Enough lengths for so many tokens: log-normal with a median of 3/8 of the longest and cut there, as of
    multi-turn chats; or all equal."""
    if case.lengths == "equal":
        return np.full(-(-tokens // case.longest), case.longest, np.int64)
    drawn = rng.lognormal(np.log(case.longest * 3 / 8), 0.8, 8 * tokens // case.longest + 64)
    lengths = np.clip(drawn, SHORTEST, case.longest).astype(np.int64)
    return lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
