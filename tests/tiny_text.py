"""A tokenizer of single bytes and conversations, for tests that need no real vocabulary.

base = write_base(folder); records = conversations(seed=0, count=100)
"""

import json
import random
from pathlib import Path

from benchmarks import step_cases


def write_base(folder: Path) -> Path:
    """A folder with a tokenizer.json of 256 bytes, BOS, EOS and the end of turn."""
    folder.mkdir(parents=True, exist_ok=True)
    step_cases.write_bytes_tokenizer(folder, step_cases.END_OF_TURN)
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
