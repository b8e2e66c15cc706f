"""Reproduce the paper's claims in ten minutes on two CPU cores: a tiny Llama, computed conversations, `ochat ablate`.

    python examples/ablation/small.py                                        # 6 variants with 5 seeds
    python examples/ablation/small.py --ablate.subsample="[0.6, 0.8]"        # more options go to `ochat ablate`

The task: a question is six words of a language of 96; the right answer translates each by a fixed secret dictionary and
keeps the order. Expert answers (GPT4) are right. Sub-optimal ones (GPT3) translate every word correctly and always
reverse the order. There are eleven sub-optimal conversations for each expert one, as in the paper: they teach the
dictionary, but only the experts show the right order, and imitating the mixture learns the error. Held-out questions
are new, and answered by both classes. Each seed draws everything again: the dictionary, the conversations, the initial
weights and the order of the data. `ochat prepare` reads the conversations with OpenChat's template for Llama 2 and a
tokenizer with one token per word; the model starts from random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from ochat import cli
from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions

HERE = Path(__file__).resolve().parent
CONFIG, WORK = HERE / "small.toml", Path("ablations/small")
NUM_WORDS, LENGTH = 96, 6
NUM_EXPERT, NUM_SUBOPTIMAL, NUM_HELD_OUT = 200, 2200, 500
EXPERT, SUBOPTIMAL = "GPT4", "GPT3"
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
WORDS = [first + second for first in SYLLABLES[:2] for second in SYLLABLES][:NUM_WORDS]
SPECIALS = ("<s>", "</s>", "<unk>", "<|end_of_turn|>")
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    """Make the files of each seed, then run `ochat ablate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help=f"where everything goes (default: {WORK})")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--expert", type=int, default=NUM_EXPERT, help="expert conversations")
    parser.add_argument("--suboptimal", type=int, default=NUM_SUBOPTIMAL, help="sub-optimal conversations")
    options, more = parser.parse_known_args()
    for seed in range(options.seeds):
        make(options.work, seed, options.expert, options.suboptimal)
    files = {
        "base.path": f"{options.work}/base-{{seed}}",
        "ablate.dir": f"{options.work}/ablation",
        "ablate.input": json.dumps([f"{options.work}/train-{{seed}}.jsonl"]),
        "ablate.held_out": json.dumps([f"{options.work}/held_out-{{seed}}.jsonl"]),
        "ablate.seeds": json.dumps(list(range(options.seeds))),
    }
    cli.run("ablate", [str(CONFIG), *(f"--{key}={value}" for key, value in files.items()), *more])


def make(folder: Path, seed: int, num_expert: int, num_suboptimal: int) -> None:
    """Write one seed's conversations, and its base unless it exists."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    secret = dict(zip(WORDS, rng.sample(WORDS, NUM_WORDS), strict=True))
    total = num_expert + num_suboptimal + NUM_HELD_OUT
    questions: dict[tuple[str, ...], None] = {}
    while len(questions) < total:
        questions[tuple(rng.choices(WORDS, k=LENGTH))] = None
    asked = list(questions)
    classes = [EXPERT] * num_expert + [SUBOPTIMAL] * num_suboptimal
    train = [conversation(question, name, secret) for question, name in zip(asked, classes, strict=False)]
    held_out = [conversation(q, name, secret) for q in asked[len(train) :] for name in (EXPERT, SUBOPTIMAL)]
    write(train, folder / f"train-{seed}.jsonl")
    write(held_out, folder / f"held_out-{seed}.jsonl")
    if not (folder / f"base-{seed}").exists():
        make_base(folder / f"base-{seed}", seed)


def answer(question: tuple[str, ...], name: str, secret: dict[str, str]) -> list[str]:
    """The words with which a class answers."""
    right = [secret[word] for word in question]
    return right if name == EXPERT else right[::-1]


def conversation(question: tuple[str, ...], name: str, secret: dict[str, str]) -> dict[str, object]:
    """The record that `ochat prepare` reads."""
    items = [
        {"role": "user", "content": " ".join(question)},
        {"role": "assistant", "content": " ".join(answer(question, name, secret))},
    ]
    return {"items": items, "condition": name}


def make_base(output: Path, seed: int) -> None:
    """A tiny Llama with random weights; its tokenizer has one token for each word, those of the prefixes included."""
    words = [*SPECIALS, *WORDS, "User:", "Assistant:", EXPERT, SUBOPTIMAL]
    model = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(SPECIALS))
    source = output.with_name(f".{output.name}.source")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    model.save(str(source / "tokenizer.json"))
    named = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    settings = MODEL | {"vocab_size": len(words)}
    (source / "model.json").write_text(json.dumps(settings), encoding="utf-8")
    random_model = source / "model.json"
    init_base.main(InitBaseOptions(output, random=random_model, tokenizer=source, seed=seed, dtype="float32"))
    shutil.rmtree(source)


def write(records: list[dict[str, object]], path: Path) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
