"""Answer prompts under chosen classes, as conversations that `ochat prepare` and `ochat eval` read.

    asked = read_prompts(Path("prompts.jsonl"), ["GPT4", "GPT3"])
    encoded = encode(asked, template, tokenizer, 4096);  answers(model, asked, encoded, template.eot, tokenizer, 256)

A record is {"prompt": "...", "system": "..."} or a conversation, whose last answer is dropped and asked for again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ochat.console import bar
from ochat.data.readers import parse_records
from ochat.errors import ConfigError, DataError
from ochat.infer.generate import generate
from ochat.model.transformer import Transformer
from ochat.text import record_formats
from ochat.text.conversation import (
    Conversation,
    Message,
    refuse_misspelt,
    text_field,
)
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 16  # each holds a cache of keys and values as long as the batch's longest


@dataclass(frozen=True)
class Prompt:
    """A conversation without its answer, and the class that is to give it."""

    place: str  # file:line
    conversation: Conversation


def read_prompts(path: Path, conditions: Sequence[str]) -> list[Prompt]:
    """Every prompt under every condition. Raises: DataError naming file and line of a record without a prompt."""
    return [
        Prompt(record.location, replace(conversation, condition=condition))
        for record, conversation in parse_records(path, _unanswered)
        for condition in conditions
    ]


def encode(asked: Sequence[Prompt], template: Template, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """The ids of each prompt, ready for its answer. Raises: ConfigError naming one that fills the model's context."""
    plain = replace(template, default_condition="")  # which would replace an empty class
    encoded = []
    for each in asked:
        encoded.append(plain.encode_prompt(each.conversation, tokenizer))
        if len(encoded[-1]) >= context:
            raise ConfigError(
                f"{each.place}: the prompt has {len(encoded[-1])} tokens, but the model's context is {context}; "
                "shorten it or leave it out"
            )
    return encoded


def answers(
    model: Transformer,
    asked: Sequence[Prompt],
    prompts: Sequence[list[int]],
    stop: str,
    tokenizer: Tokenizer,
    most: int,
) -> Iterator[dict[str, Any]]:
    """The records of the answered conversations, in order, each as soon as its batch is done. Decoding is greedy, up to
    the token `stop` or `most` tokens.

    A record also has `source`, the prompt's file:line, and `is_cut`: the answer did not reach `stop`.
    """
    for first in range(0, len(asked), PROMPTS_PER_BATCH):
        batch = slice(first, first + PROMPTS_PER_BATCH)
        found = generate(model, prompts[batch], max_new_tokens=most, stop_ids=[tokenizer.special_tokens[stop]])
        for each, prompt, ids in zip(asked[batch], prompts[batch], found, strict=True):
            answer = Message("assistant", tokenizer.decode(ids))
            answered = replace(each.conversation, items=(*each.conversation.items, answer))
            is_cut = len(ids) == min(most, model.config.max_position_embeddings - len(prompt))
            yield answered.to_dict() | {"source": each.place, "is_cut": is_cut}


def write_answers(path: Path, records: Iterator[dict[str, Any]], total: int) -> None:
    """Write the records as JSON Lines, each as soon as it is known. Raises: OSError."""
    with path.open("w", encoding="utf-8", newline="") as file, bar("answers", total) as advance:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            advance(1)


def _unanswered(value: dict[str, Any]) -> Conversation:
    """A record's conversation up to its last question, without weights."""
    if "prompt" in value:
        refuse_misspelt(value, ("prompt", "system"), "record")
        text, system = text_field(value, "prompt", "prompt"), text_field(value, "system", "system")
        return Conversation((Message("user", text),), system=system)
    conversation = record_formats.convert(value)
    items = tuple(replace(item, weight=None) for item in conversation.items)
    items = items[:-1] if items[-1].role == "assistant" else items
    if not items:
        raise DataError("items: an answer without a question; a prompt needs a user message")
    return replace(conversation, items=items, reward=None)
