"""Find wrong words by scores, weigh them 0 and train again: the loop of docs/scoring.md in three minutes on a CPU.

    python examples/scoring.py                          # in the folder scoring/
    python examples/scoring.py --work scoring-1 --seed 1

The task is that of ablation/small.py, with a fault: a tenth of the words in the training answers, of both classes, are
drawn at random. A first run learns from all of it. Token cleaning (arXiv 2502.01968) keeps nine tenths of the tokens:
those that it made most likelier than they were for the base. A second run starts anew and learns from those alone.
Held-out answers have no wrong words.
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from pathlib import Path

import numpy as np
import tomli_w
from ablation import small
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file

from ochat import cli

WORK, EPOCHS = Path("scoring"), 10
WRONG = 0.1  # of the words in training answers
KEPT = 0.9  # of the tokens
console = Console(highlight=False)


def main() -> None:
    """Make the data, train, score, weigh, train again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"a new folder for everything (default: {WORK})")
    parser.add_argument("--seed", type=int, default=0, help="decides data and initial weights (default: 0)")
    options = parser.parse_args()
    work, seed = options.work, options.seed
    small.make(work, seed, small.NUM_EXPERT, small.NUM_SUBOPTIMAL)
    planted = plant(work / f"train-{seed}.jsonl", seed)
    prepare(work, seed, "held_out", "held_out")
    prepare(work, seed, "train", "data")
    train(work, seed, "data", "first")
    for name, model in (("before", f"base-{seed}"), ("after", "first")):
        run("score", work / model, work / "data", work / name, "--dtype", "float32")
    before, after = (load_file(work / name / "tokens.safetensors") for name in ("before", "after"))
    gain = before["nll"][0] - after["nll"][0]
    after["weights"] = (gain >= np.quantile(gain, 1 - KEPT)).astype(np.float32)
    save_file(after, work / "weights.safetensors")
    console.print(said_of(planted, after["weights"], after["offsets"]))
    prepare(work, seed, "train", "cleaned", "--token-weights", work / "weights.safetensors")
    train(work, seed, "cleaned", "second")
    for name in ("first", "second"):
        run("eval", work / name, work / "held_out", "--dtype", "float32", "--conditions", small.EXPERT)


def plant(path: Path, seed: int) -> list[list[int]]:
    """Put wrong words into the answers of a file; the places of each record's."""
    draw, records, places = random.Random(seed), [], []
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        words = record["items"][1]["content"].split()
        places.append([i for i in range(len(words)) if draw.random() < WRONG])
        for i in places[-1]:
            words[i] = draw.choice([word for word in small.WORDS if word != words[i]])
        record["items"][1]["content"] = " ".join(words)
        records.append(record)
    small.write(records, path)
    return places


def said_of(planted: list[list[int]], weights: NDArray[np.float32], offsets: NDArray[np.int64]) -> str:
    """How many of the wrong words, and of all other tokens, have weight 0. A word is a token."""
    is_wrong = np.zeros(len(weights), bool)
    for first, places in zip(offsets, planted, strict=False):
        is_wrong[first + np.array(places, np.int64)] = True
    wrong, other = (float((weights[chosen] == 0).mean()) for chosen in (is_wrong, ~is_wrong))
    return f"weight 0: {wrong:.1%} of the {is_wrong.sum():,} wrong words, {other:.1%} of the other tokens"


def prepare(work: Path, seed: int, source: str, name: str, *more: object) -> None:
    """`ochat prepare` of a file in the work folder."""
    base = ("--base", work / f"base-{seed}", "--template", "openchat_v3.2")
    run("prepare", "--input", work / f"{source}-{seed}.jsonl", *base, "--output", work / name, *more)


def train(work: Path, seed: int, data: str, name: str) -> None:
    """`ochat train` with the settings of the small ablation study."""
    settings = tomllib.loads(small.CONFIG.read_text("utf-8"))
    del settings["ablate"]
    settings["data"]["epochs"] = EPOCHS
    (work / "lab.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    paths = (f"--base.path={work}/base-{seed}", f"--data.path={work}/{data}", f"--run.dir={work}/{name}")
    run("train", work / "lab.toml", *paths)


def run(command: str, *arguments: object) -> None:
    """Show a command, and run it."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ ochat {command} {' '.join(words)}", style="green", markup=False, soft_wrap=True)
    cli.run(command, words)


if __name__ == "__main__":
    main()
