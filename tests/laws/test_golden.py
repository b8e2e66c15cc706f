"""Token ids of every template and the packing plans of five sets of lengths are the committed integers.

python -m tests.laws.test_golden          # writes golden_integers.json anew: only in a commit that says why
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import step_cases
from ochat.packing import multipack
from ochat.text import template as templates
from ochat.text import tokenizer as text_tokenizers
from ochat.text.conversation import Conversation
from tests import text_kit

FILE = Path(__file__).with_name("golden_integers.json")
TOKENIZERS = ("bytes", "mistral", "llama3")
CONVERSATIONS = {
    "one turn": {"items": [["user", "Hello, world!"], ["assistant", ":) Hi <|end_of_turn|></s><|eot_id|>"]],
                 "condition": "GPT4"},
    "blanks, system, weights": {"items": [["user", "  two\n", 0.5], ["assistant", "", 1.0], ["user", "2+2?", 0.0],
                                          ["assistant", "4\n\n", -0.25]], "system": " Be\tbrief. "},
    "scripts": {"items": [["user", "naïve e\u0301 漢字 \u0645\u0631 😀\u200d😀 isn't 1234567"],
                          ["assistant", "\u2581\u2028\u00a0 ok\r\n<|im_end|>"]], "condition": "Math Correct"},
}  # fmt: skip

PLANS = {  # name -> seed, number of sequences, longest, options of plan()
    "chats": (1, 3000, 2048, {"token_budget": 8192, "bins_per_step": 8}),
    "one bin a step": (2, 500, 700, {"token_budget": 2048, "bins_per_step": 1}),
    "tight": (3, 800, 1024, {"token_budget": 1024, "bins_per_step": 4}),
    "few": (4, 5, 300, {"token_budget": 512, "bins_per_step": 16}),
    "short": (5, 6000, 40, {"token_budget": 1024, "bins_per_step": 2, "max_sequences": 60}),
}


def encoded(name: str, folder: Path) -> dict[str, dict[str, list]]:
    """Of one of TOKENIZERS, that of bytes written into `folder`:
    template -> conversation -> [ids, first and weight of each run of equal weights, ids of the prompt].
    """
    path = folder if name == "bytes" else text_kit.real_tokenizer(name)
    if name == "bytes":
        step_cases.write_bytes_tokenizer(folder)
    found: dict[str, dict[str, list]] = {}
    for template in map(templates.load, templates.names()):
        if template.tokenize == "rendered":  # their ids are those of other libraries: tests/text/test_rendered.py
            continue
        tokenizer = text_tokenizers.load(path, (template.eot, *template.special_tokens))
        for title, record in CONVERSATIONS.items():
            items = [dict(zip(("role", "content", "weight"), item, strict=False)) for item in record["items"]]
            conversation = Conversation.from_dict(record | {"items": items})
            ids, weights = template.encode(conversation, tokenizer)
            runs = [[i, w] for i, w in enumerate(weights) if i == 0 or w != weights[i - 1]]
            prompt = template.encode_prompt(conversation, tokenizer)
            found.setdefault(template.name, {})[title] = [list(ids), runs, list(prompt)]
    return found


def plans() -> dict[str, Any]:
    """Every plan's arrays, of two epochs, with and without costs: sums and digests."""
    found = {}
    for name, (seed, count, longest, options) in PLANS.items():
        draw = random.Random(seed)
        lengths = [1 + min(draw.randrange(longest), draw.randrange(longest)) for _ in range(count)]
        for costs in (None, [length * (512 + length) for length in lengths]):
            for epoch in (0, 1):
                made = multipack.plan(np.array(lengths), seed=seed, epoch=epoch, costs=costs, **options)
                arrays = (made.indices, made.bin_offsets)
                where = f"{name}, epoch {epoch}{', costs' if costs else ''}"
                found[where] = [int(made.num_steps), *(digest(array, "<i8") for array in arrays)]
    return found


def digest(array: Any, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_weights_of_every_template(name, tmp_path):
    expected = json.loads(FILE.read_text("utf-8"))["ids"][name]
    assert encoded(name, tmp_path) == expected and len(expected) >= 8


def test_plans():
    assert plans() == json.loads(FILE.read_text("utf-8"))["plans"]


def write(folder: Path) -> None:
    """Writes the file anew from the current code."""
    ids = {name: encoded(name, folder) for name in TOKENIZERS}
    lines = [f'"{tokenizer}": {{\n' + ",\n".join(f'"{name}": {json.dumps(cases)}' for name, cases in of_each.items())
             + "\n}" for tokenizer, of_each in ids.items()]  # fmt: skip
    written = ",\n".join(f'"{name}": {json.dumps(plan)}' for name, plan in plans().items())
    text = f'{{"plans": {{\n{written}\n}},\n"ids": {{\n' + ",\n".join(lines) + "\n}}\n"
    json.loads(text)
    FILE.write_text(text, "utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
