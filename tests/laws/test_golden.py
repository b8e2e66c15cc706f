"""Token ids of every template and the packing plans of five sets of lengths are the committed integers.

    python -m tests.laws.test_golden          # writes golden_integers.json anew: only in a commit that says why
`python -m benchmarks.golden` compares the floats of two commits on one machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_cases
from ochat.text import template as templates
from ochat.text import tokenizer as text_tokenizers
from ochat.text.conversation import Conversation
from tests.laws import golden_plans

FILE = Path(__file__).with_name("golden_integers.json")
CACHE = Path(__file__).parents[2] / ".cache" / "tokenizers"
REAL = {
    "mistral": CACHE / "mistral_common/data/tokenizer.model.v1",
    "llama3": CACHE / "llama_models/llama3/tokenizer.model",
}
CONVERSATIONS = {
    "one turn": {"items": [["user", "Hello, world!"], ["assistant", ":) Hi <|end_of_turn|></s><|eot_id|>"]],
                 "condition": "GPT4"},
    "blanks, system, weights": {"items": [["user", "  two\n", 0.5], ["assistant", "", 1.0], ["user", "2+2?", 0.0],
                                          ["assistant", "4\n\n", -0.25]], "system": " Be\tbrief. "},
    "scripts": {"items": [["user", "naïve e\u0301 漢字 \u0645\u0631 😀\u200d😀 isn't 1234567"],
                          ["assistant", "\u2581\u2028\u00a0 ok\r\n<|im_end|>"]], "condition": "Math Correct"},
}  # fmt: skip


def bytes_tokenizer(folder: Path) -> Path:
    step_cases.write_bytes_tokenizer(folder)
    return folder


def encoded(path: Path) -> dict[str, dict[str, list]]:
    """template -> conversation -> [ids, first and weight of each run of equal weights, ids of the prompt]."""
    found: dict[str, dict[str, list]] = {}
    for name in templates.names():
        template = templates.load(name)
        tokenizer = text_tokenizers.load(path, (template.eot, *template.special_tokens))
        for title, record in CONVERSATIONS.items():
            items = [dict(zip(("role", "content", "weight"), item, strict=False)) for item in record["items"]]
            conversation = Conversation.from_dict(record | {"items": items})
            ids, weights = template.encode(conversation, tokenizer)
            runs = [[i, w] for i, w in enumerate(weights) if i == 0 or w != weights[i - 1]]
            prompt = template.encode_prompt(conversation, tokenizer)
            found.setdefault(name, {})[title] = [list(ids), runs, list(prompt)]
    return found


@pytest.mark.parametrize("name", ["bytes", *REAL])
def test_ids_and_weights_of_every_template(name, tmp_path):
    path = REAL[name] if name in REAL else bytes_tokenizer(tmp_path)
    if not path.exists():
        pytest.skip(f"the real {name} tokenizer is not at {path}; `make test` puts it there")
    expected = json.loads(FILE.read_text("utf-8"))["ids"][name]
    assert encoded(path) == expected and len(expected) >= 8


def test_plans():
    assert golden_plans.plans() == json.loads(FILE.read_text("utf-8"))["plans"]


def write(folder: Path) -> None:
    """Writes the file anew from the current code."""
    ids = {name: encoded(path) for name, path in {"bytes": bytes_tokenizer(folder), **REAL}.items()}
    lines = [f'"{tokenizer}": {{\n' + ",\n".join(f'"{name}": {json.dumps(cases)}' for name, cases in of_each.items())
             + "\n}" for tokenizer, of_each in ids.items()]  # fmt: skip
    plans = ",\n".join(f'"{name}": {json.dumps(plan)}' for name, plan in golden_plans.plans().items())
    text = f'{{"plans": {{\n{plans}\n}},\n"ids": {{\n' + ",\n".join(lines) + "\n}}\n"
    json.loads(text)
    FILE.write_text(text, "utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
