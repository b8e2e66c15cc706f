"""What the whole step is measured on: models, settings that fit a card of 139 GiB, and drawn conversations.

    case = PHASES["ours"][0]; world = make_world(case, Path("work"), torch.device("cuda"))
Without a base and data of the user's, weights are drawn on the device and conversations have log-normal lengths, as
chats have; loader.py's `write` lays them out. Letters as in cases.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ochat_kernels
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from benchmarks import loader
from benchmarks.cases import MODELS, Model
from benchmarks.train_step_peers import Peer
from ochat.model import hf
from ochat.model.config import ModelConfig
from ochat.model.transformer import Transformer
from ochat.text import tokenizer as ochat_tokenizers

LAYERS = {"Llama-3-8B": 32, "Llama-2-7B": 32, "Llama-3.2-1B": 16, "Llama-3.2-3B": 28, "tiny": 2, "small": 4}
TIED = ("Llama-3.2-1B", "Llama-3.2-3B")
SMALL_MODELS = {
    "tiny": Model("tiny", H=64, F=96, N=4, K=2, D=16, V=512),
    "small": Model("small", H=256, F=704, N=4, K=2, D=64, V=8192),  # large enough that a CPU's time is in products
}
SHORTEST = 64  # of the drawn conversations; a turn of each side is as long
OURS, PEERS = ("ours",), ("ours", "padded", "packed", "liger", "trl")
BF16 = ("--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")
IN_BACKWARD = (*BF16, "--optim.in_backward=true", "--optim.clip=0.0")  # no gradients are held
CLASSES = ("--classes.GPT4.weight=1.0", "--classes.GPT3.weight=0.1")  # the drawn conversations name no weights


@dataclass(frozen=True)
class Case:
    """One model and cut, and who is measured on it."""

    model: str
    token_budget: int
    bins_per_step: int
    implementations: tuple[str, ...] = OURS
    options: tuple[str, ...] = ()  # of ours: --section.key=value
    peer: Peer = Peer()
    longest: int = 4096  # of the drawn conversations, tokens
    lengths: str = "chats"  # or "equal": every conversation is `longest`
    supervised: float = 0.5  # share of the drawn tokens

    @property
    def title(self) -> str:
        options = f", {' '.join(self.options)}" if self.options else ""
        return f"{self.model}, {self.bins_per_step} x {self.token_budget}{options}"


# The most wanted first. Ours recomputes what the plan says it must (train.recompute = "auto"): nothing, but for 8B with
# fp32 masters and for 8B at 32,768 tokens. Tests hold what the plan says of each to the memory of an H200.
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
QUICK = {
    "ours": [Case("tiny", 512, 2, longest=256)],
    "peers": [Case("tiny", 512, 2, ("ours", "padded", "packed", "liger"), longest=256)],
}


@dataclass(frozen=True)
class World:
    """Folders of a base and its data, and what a configuration says of them."""

    base: Path
    data: Path
    model: ModelConfig
    options: tuple[str, ...] = ()


def options(case: Case, settings: dict[str, Any]) -> list[str]:
    """--section.key=value of a run of the case: `settings`, how it is cut, and what the case sets itself."""
    cut = {"data.token_budget": case.token_budget, "data.bins_per_step": case.bins_per_step}
    return [*(f"--{key}={value}" for key, value in (settings | cut).items()), *case.options]


def make_world(case: Case, folder: Path, device: torch.device, num_steps: int) -> World:
    """A base with drawn weights and enough drawn conversations for `num_steps`, under `folder`."""
    world = World(folder / "base", folder / "data", model_config(case), CLASSES)
    write_base(world, device)
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


def write_base(world: World, device: torch.device) -> None:
    """A Hugging Face folder in bf16: weights drawn on the device, one at a time, and a tokenizer of bytes."""
    hf.save(world.base, world.model, draw_parameters(world.model, device), "bfloat16")
    write_tokenizer(world.base)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(token_models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end_of_turn|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


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
        torch.cuda.empty_cache()  # whoever is measured has the card's memory


def draw_lengths(case: Case, rng: np.random.Generator, tokens: int) -> NDArray[np.int64]:
    """Enough lengths for so many tokens: log-normal with a median of 3/8 of the longest and cut there, as of
    multi-turn chats; or all equal."""
    if case.lengths == "equal":
        return np.full(-(-tokens // case.longest), case.longest, np.int64)
    drawn = rng.lognormal(np.log(case.longest * 3 / 8), 0.8, 8 * tokens // case.longest + 64)
    lengths = np.clip(drawn, SHORTEST, case.longest).astype(np.int64)
    return lengths[: int(np.searchsorted(lengths.cumsum(), tokens)) + 1]
