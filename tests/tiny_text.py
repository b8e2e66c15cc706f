"""A tokenizer of single bytes and conversations, for tests that need no real vocabulary.

base = write_base(folder); records = conversations(seed=0, count=100)
"""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPECIALS = ("<s>", "</s>", "<|end_of_turn|>")


def write_base(folder: Path) -> Path:
    """A folder with a tokenizer.json whose ids are 256 bytes and SPECIALS."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def conversations(seed: int, count: int, longest: int = 40) -> list[dict]:
    """Records of one to three exchanges in two classes, some with weights, a system text or a trailing question."""
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice("abc de\n<|") for _ in range(rng.randint(0, longest)))

    def turn(role: str) -> dict:
        weight = {} if rng.random() < 0.5 else {"weight": rng.choice([0.0, 0.5, 1.0]) if role == "user" else 1.0}
        return {"role": role, "content": text()} | weight

    def record() -> dict:
        items = [turn(role) for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")]
        items += [turn("user")] if rng.random() < 0.2 else []
        system = {"system": text()} if rng.random() < 0.3 else {}
        return {"items": items, "condition": rng.choice(["GPT4", "GPT3"])} | system

    return [record() for _ in range(count)]


def write_lines(path: Path, records: list[dict]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
