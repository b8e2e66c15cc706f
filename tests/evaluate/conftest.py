"""A base with another tokenizer, and an answer made by hand, shared by all tests of measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ochat_kernels
import pytest
import torch

from ochat.infer.generate import generate
from ochat.model import hf
from ochat.model.transformer import Transformer
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from tests import tiny
from tests.model import test_init_base


@pytest.fixture(scope="session")
def chats(world):
    return world.folder / "conversations.jsonl"


@pytest.fixture(scope="session")
def other_base(tmp_path_factory):
    """A base whose tokenizer has one token more."""
    folder = tmp_path_factory.mktemp("other")
    tiny.write_base(folder, folder / "other", {"vocab_size": 261})
    file = folder / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": "<more>", "id": 259})
    file.write_text(json.dumps(tokenizer))
    return folder / "other"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model in float64 far from uniform predictions, a template and a tokenizer."""
    folder = tmp_path_factory.mktemp("swap")
    test_init_base.write_json_tokenizer(folder)
    tokenizer = tokenizers.load(folder, ("<|end_of_turn|>",))
    config = replace(test_init_base.CONFIG, vocab_size=tokenizer.vocab_size)
    model = Transformer(config, ochat_kernels.load("reference"))
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform predictions, so that a wrong row or prefix shows
    return model.double(), templates.load("openchat_v3.2"), tokenizer


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_alone(folder: Path, asked: Conversation, most: int, temperature: float = 0.0, seed: int = 0):
    """(text, whether it was cut): the answer to one conversation, opened as training writes it."""
    model, tokenizer = hf.load(folder, dtype="float32"), tokenizers.load(folder)
    template = replace(templates.load("openchat_v3.2"), default_condition="")
    opened = replace(asked, items=(*asked.items, Message("assistant", "")))
    ids = template.encode(opened, tokenizer)[0][:-1]  # without the end of turn
    stop = [tokenizer.special_tokens[tiny.EOT]]
    (new,) = generate(model, [ids], max_new_tokens=most, stop_ids=stop, temperature=temperature, seed=seed)
    return tokenizer.decode(new), len(new) == most
