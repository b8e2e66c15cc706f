"""A base with another tokenizer, and an answer made by hand, shared by all tests of measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ochat.infer.generate import generate
from ochat.model import hf
from ochat.text import template as templates
from ochat.text import tokenizer as tokenizers
from ochat.text.conversation import Conversation, Message
from tests import tiny


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
