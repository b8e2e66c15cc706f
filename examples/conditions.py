"""Make conditions of a continuous reward, train with goals and dropout, and ask under each: two minutes on a CPU.

    python examples/conditions.py
    python examples/conditions.py --condition.goals=own --condition.last=0.2       # more options go to `ochat train`

The task: a question is six words, and the right answer translates each by a fixed secret dictionary. Most answers
translate only the first few words and repeat the others. A judge with some noise rewards the translated share.
`ochat prepare --condition-from reward --quantiles 3` makes three classes of the rewards, reward:0 to reward:2. With
condition.goals = "at_least" an answer is trained under its own class or a lower one (arXiv 2605.16345), and with
condition.dropout sometimes under none. Then new questions are asked under each class and under none, and the share of
rightly translated words is printed.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from ochat import cli
from ochat.commands import init_base
from ochat.commands.init_base import InitBaseOptions

WORK = Path("runs/conditions")
LENGTH, NUM_TRAINED, NUM_ASKED, LEVELS = 6, 3000, 200, 3
WORDS = [a + b + c for a in "bd" for b in ("ak", "el", "im", "on", "ur", "as", "et", "iz") for c in "aeiouy"]
CLASSES = [f"reward:{level}" for level in range(LEVELS)]
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.05,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CONFIG = f"""
[run]
dir = "{WORK}/run"
[base]
path = "{WORK}/base"
[data]
path = "{WORK}/data"
token_budget = 2432
bins_per_step = 1
epochs = 9
[condition]
dropout = 0.1
goals = "at_least"
[optim]
lr = 3e-3
eps = 1e-8
[train]
dtype = "float32"
device = "cpu"
log_every = 25
"""


def main() -> None:
    """Make the data, train, ask."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    rng = random.Random(0)
    secret = dict(zip(WORDS, rng.sample(WORDS, len(WORDS)), strict=True))
    write("train.jsonl", [record(rng, secret) for _ in range(NUM_TRAINED)])
    questions = [rng.choices(WORDS, k=LENGTH) for _ in range(NUM_ASKED)]
    write("questions.jsonl", [{"prompt": " ".join(question)} for question in questions])
    make_base()
    (WORK / "config.toml").write_text(CONFIG, encoding="utf-8")
    options = ["--template", "openchat_v3.2", "--condition-from", "reward", "--quantiles", str(LEVELS)]
    paths = ["--input", f"{WORK}/train.jsonl", "--base", f"{WORK}/base", "--output", f"{WORK}/data"]
    cli.run("prepare", [*paths, *options])
    cli.run("train", [f"{WORK}/config.toml", *sys.argv[1:]])
    print("\ncondition    translated words, of new questions")
    for condition in [*CLASSES, ""]:
        found = [share(question, answer, secret) for question, answer in zip(questions, ask(condition), strict=True)]
        print(f"{condition or '(none)':12} {statistics.mean(found):.1%}")


def record(rng: random.Random, secret: dict[str, str]) -> dict[str, object]:
    """A question, an answer that is more often bad than good, and its reward."""
    question = rng.choices(WORDS, k=LENGTH)
    count = min(rng.randint(0, LENGTH) for _ in range(2))
    answer = [secret[word] for word in question[:count]] + question[count:]
    items = [{"role": "user", "content": " ".join(question)}, {"role": "assistant", "content": " ".join(answer)}]
    return {"items": items, "reward": count / LENGTH + rng.gauss(0, 0.02)}


def share(question: list[str], answer: str, secret: dict[str, str]) -> float:
    """The share of words that is rightly translated."""
    right = [secret[word] for word in question]
    return sum(a == b for a, b in zip(right, answer.split(), strict=False)) / LENGTH


def ask(condition: str) -> list[str]:
    """The model's answers to the questions."""
    path = WORK / f"answers-{condition or 'none'}.jsonl"
    options = ["--prompts", f"{WORK}/questions.jsonl", "--output", str(path), "--max-new-tokens", "10"]
    cli.run("generate", [f"{WORK}/run", "--condition", condition, *options])
    return [json.loads(line)["items"][-1]["content"] for line in path.read_text("utf-8").splitlines()]


def make_base() -> None:
    """A tiny Llama with random weights; its tokenizer has one token for each word, those of the prefixes included."""
    specials = ["<s>", "</s>", "<unk>", "<|end_of_turn|>"]
    words = [*specials, *WORDS, "User:", "Assistant:", *CLASSES]
    model = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(specials)
    source = WORK / "source"
    source.mkdir()
    model.save(str(source / "tokenizer.json"))
    named = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    (source / "model.json").write_text(json.dumps(MODEL | {"vocab_size": len(words)}), encoding="utf-8")
    init_base.main(InitBaseOptions(WORK / "base", random=source / "model.json", tokenizer=source, dtype="float32"))


def write(name: str, records: list[dict[str, object]]) -> None:
    """Write JSON Lines."""
    (WORK / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
