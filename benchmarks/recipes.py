"""The table of configs/README.md: what `ochat plan` predicts for each recipe on usual machines. Nothing is measured.

    PYTHONPATH=.:kernels python -m benchmarks.recipes --write      # without --write: prints the table

For each machine the first of SETTINGS that fits, and the micro-batch that the plan recommends there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.train_step_cases import Case, draw_lengths
from ochat import config as configuration
from ochat.model.config import ModelConfig
from ochat.plan import forecast
from ochat.plan.forecast import Forecast, Run
from ochat.plan.gpus import CARDS, Card
from ochat.plan.lengths import LengthCounts
from ochat.plan.memory import GIB
from ochat.plan.roofline import Workload

CONFIGS = Path(__file__).parents[1] / "configs"
BEGIN, END = "<!-- by benchmarks.recipes -->\n", "<!-- end -->\n"
MACHINES = ((1, 1), (4, 1), (8, 1), (8, 4))  # GPUs, nodes
FILL, SUPERVISED = 0.995, 0.5
SHAPES = {  # recipe -> hidden, FFN, heads, key/value heads, head dim, vocabulary, layers, tied
    "llama3.2_1b": (2048, 8192, 32, 8, 64, 128256, 16, True),
    "llama3.2_3b": (3072, 8192, 24, 8, 128, 128256, 28, True),
    "llama2_7b": (4096, 11008, 32, 32, 128, 32000, 32, False),
    "llama3_8b_8gpu": (4096, 14336, 32, 8, 128, 128256, 32, False),
    "llama2_13b": (5120, 13824, 40, 40, 128, 32000, 40, False),
    "llama3_70b": (8192, 28672, 64, 8, 128, 128256, 80, False),
}
BF16 = ("--optim.master_dtype=bfloat16", "--optim.moment_dtype=bfloat16")
SETTINGS: tuple[tuple[str, ...], ...] = (  # in the order in which one would want them
    (),
    ("--parallel.reduce=micro_batch",),
    ("--optim.moment_dtype=bfloat16",),
    BF16,
    ("--parallel.offload=optimizer",),
    ("--lora.rank=16",),
)


def model_config(recipe: str) -> ModelConfig:
    """The shape of a recipe's model, as its config.json would have it."""
    hidden, ffn, heads, kv_heads, head_dim, vocabulary, layers, tied = SHAPES[recipe]
    record = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return ModelConfig.from_hf(record)


def workload() -> Workload:
    """Chats of up to 4,096 tokens, half of them supervised, packed without loss."""
    lengths = draw_lengths(Case("tiny", 8192, 64), np.random.default_rng(0), 1_000_000)
    return Workload(LengthCounts.of(lengths), SUPERVISED, FILL)


def predict(recipe: str, card: Card, gpus: int, nodes: int, work: Workload) -> tuple[tuple[str, ...], Forecast] | None:
    """The first of SETTINGS that fits with a budget that holds the longest chat, and its forecast; None if none."""
    layouts = ((f"--parallel.replicate={nodes}",), ()) if nodes > 1 else ((),)  # a copy a node, or one over all
    for options in ((*setting, *layout) for setting in SETTINGS for layout in layouts):
        if gpus * nodes == 1 and "--parallel.reduce=micro_batch" in options:
            continue
        if found := _forecast(recipe, card, gpus, nodes, work, options):
            return options, found
    return None


def _forecast(
    recipe: str, card: Card, gpus: int, nodes: int, work: Workload, options: tuple[str, ...]
) -> Forecast | None:
    """As the plan recommends it: the recipe with the best budget."""
    config = configuration.load(CONFIGS / f"{recipe}.toml", options)
    run = Run(model_config(recipe), config, work, num_steps=1000)
    best = forecast.forecast(run, card, gpus=gpus, nodes=nodes).best
    if best is None:
        return None
    cut = [f"--data.token_budget={best.token_budget}", f"--data.bins_per_step={best.bins_per_step}"]
    config = configuration.load(CONFIGS / f"{recipe}.toml", [*options, *cut])
    found = forecast.forecast(Run(run.model, config, work, num_steps=1000), card, gpus=gpus, nodes=nodes)
    return found if found.fits else None


def rows() -> Iterator[str]:
    """The lines of the table."""
    yield "| recipe | GPUs | set besides | micro-batch | recompute | GiB a GPU | tokens/s a GPU | MFU |"
    yield "|---|---|---|---|---|---|---|---|"
    work = workload()
    for recipe in SHAPES:
        for gpus, nodes in MACHINES:
            for card in CARDS.values():
                yield _row(recipe, card, gpus, nodes, predict(recipe, card, gpus, nodes, work))


def _row(
    recipe: str, card: Card, gpus: int, nodes: int, found: tuple[tuple[str, ...], Forecast] | None
) -> str:  # fmt: skip
    machine = f"{f'{nodes} x ' if nodes > 1 else ''}{gpus} {card.name}"
    if found is None:
        return f"| {recipe} | {machine} | does not fit | | | | | |"
    options, expected = found
    named = " ".join(f"`{option.removeprefix('--')}`" for option in options)
    assert expected.best is not None
    budget = f"{expected.best.token_budget:,}"
    per_gpu = expected.speed.tokens_per_s / (gpus * nodes)
    cells = [recipe, machine, named, budget, expected.recompute, f"{expected.use.total / GIB:.0f}"]
    return f"| {' | '.join([*cells, f'{per_gpu:,.0f}', f'{expected.speed.mfu:.0%}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.recipes", description="what ochat plan predicts for each recipe")
    parser.add_argument("--write", action="store_true", help="put the table into configs/README.md")
    table = "\n".join(rows()) + "\n"
    if not parser.parse_args().write:
        print(table)
        return
    readme = CONFIGS / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    readme.write_text(before + BEGIN + table + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
